package scenarios

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// Who knows nothing but README.md, docs/migration.md and deploy/README.md, and types what stands there, comes from kube2iam to
// imdsgate node by node without changing a pod, gives a service account a role, finds out why a pod got nothing, and gets rid of
// it all again.
func TestScenarioReader(t *testing.T) {
	s := beginScenario(t, 5*time.Minute)
	s.install()
	s.cleanUp()
	r := &reader{scenario: s, bin: s.TempDir()}
	r.build()

	// As kube2iam's documentation has it: a role on the pod, the permitted ones on the namespace.
	reporting := s.role("reporting")
	s.newNamespace("reports", map[string]string{"iam.amazonaws.com/allowed-roles": `["reporting"]`})
	s.serviceAccount("reports", "app", "")
	var before [3]*corev1.Pod
	for node := 1; node <= 2; node++ {
		name := fmt.Sprint("reporter", node)
		s.create(podSpec{namespace: "reports", name: name, account: "app", node: node, args: []string{"idle"}, edit: func(p *corev1.Pod) {
			p.Annotations = map[string]string{"iam.amazonaws.com/role": "reporting"}
		}})
		before[node] = s.waitPod("reports", name, running)
	}
	forecast := r.types("docs/migration.md", "imdsgate -check -all", "~/.kube/config", s.dir+"/kubeconfig")
	for _, want := range []string{"reports/reporter1 (1 pod, service account app)", "ok  imdsgate      " + reporting, "0 change"} {
		if !strings.Contains(forecast, want) {
			t.Errorf("-check -all does not say %q:\n%s", want, forecast)
		}
	}
	for node := 1; node <= 2; node++ {
		if node == 1 {
			r.types("docs/migration.md", "kubectl label node <node> imdsgate=yes", "<node>", nodeName(node))
		} else {
			s.kubectl("label", "node", nodeName(node), "imdsgate=yes")
		}
		s.waitPods(node)
		name := fmt.Sprint("reporter", node)
		s.holds(s.ask("reports", name), reporting)
		if now := s.waitPod("reports", name, running); now.UID != before[node].UID || now.Status.ContainerStatuses[0].RestartCount != 0 {
			t.Errorf("pod %s was replaced or restarted", name)
		}
	}
	r.types("docs/migration.md", "kubectl debug node/<node>", "<node>", nodeName(1), "<tag>", "dev")
	for strings.Contains(s.onNode(1, "sh", "-c", "ip -4 rule; ip -6 rule; iptables-save"), "169.254.169.254") {
		select {
		case <-s.ctx.Done():
			s.Fatal("the rules of a node that goes back to kube2iam stay")
		case <-time.After(200 * time.Millisecond):
		}
	}
	s.kubectl("-n", namespace, "delete", "pod", "-l", "app.kubernetes.io/managed-by=kubectl-debug")
	s.kubectl("label", "node", nodeName(2), "imdsgate-")
	s.helm("uninstall", release)
	s.gone()

	// README.md: a role for a service account.
	cart := s.role("cart")
	s.newNamespace("shop", nil)
	s.serviceAccount("shop", "cart", "")
	r.types("README.md", "kubectl annotate serviceaccount -n shop cart", "--set image.tag=<tag>", "", "eu-west-1", "us-east-1")
	r.types("deploy/README.md", "exec daemonset/imdsgate -- /imdsgate -check", "docker buildx", "true docker buildx", "helm install", "true helm install")
	s.create(podSpec{namespace: "shop", name: "cart-1", account: "cart", node: 1, args: []string{"idle"}})
	s.waitPod("shop", "cart-1", running)
	s.holds(s.ask("shop", "cart-1"), cart)

	// docs/load.md: how fast.
	if out := r.types("docs/load.md", "kubectl run load", "--image=<your image>", "--image=test.local/imdsgate:dev", "-duration 30s", "-duration 3s"); !strings.Contains(out, "150 operations") || !strings.Contains(out, " 0 failed") {
		t.Errorf("imdsgate-load says\n%s", out)
	}

	// docs/diagnosis.md: why it gets nothing.
	s.kubectl("annotate", "namespace", "shop", "iam.amazonaws.com/allowed-roles=[]", "--overwrite")
	s.askUntil("shop", "cart-1", "the namespace permits nothing", func(r sequence.Result) bool { return r.Code == 403 })
	// It is not served: the exit code is 1, and no other.
	said := r.types("docs/diagnosis.md", "/imdsgate -check shop/cart-1", "/imdsgate -check shop/cart-1", "/imdsgate -check shop/cart-1 && exit 9 || test $? = 1")
	if fix := "kubectl annotate namespace shop iam.amazonaws.com/allowed-roles="; !strings.Contains(said, nodeName(1)) || !strings.Contains(said, fix) {
		t.Errorf("-check shop/cart-1 does not name node and fix:\n%s", said)
	} else {
		_, command, _ := strings.Cut(said, "fix: "+fix)
		command, _, _ = strings.Cut(command, "\n")
		r.run(fix + command)
		s.askUntil("shop", "cart-1", "the fix is applied", func(r sequence.Result) bool { return r.Kind == sequence.OK })
	}

	r.types("deploy/README.md", "--set mode=cleanup")
	s.gone()
	s.figures("README, migration, diagnosis and deploy/README typed as they stand: from kube2iam's annotations to imdsgate node by node with no pod changed, a role for a service account, a refusal explained and mended, everything removed")
}

// reader types what documents say.
type reader struct {
	*scenario
	bin string // in front of the PATH: kubectl and helm of the lab, imdsgate of this checkout
}

func (r *reader) build() {
	r.Helper()
	cmd := exec.CommandContext(r.ctx, "go", "build", "-o", filepath.Join(r.bin, "imdsgate"), "./cmd/imdsgate")
	cmd.Dir, cmd.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		r.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"kubectl", "helm"} {
		r.must(os.Symlink(filepath.Join(r.scenario.bin, name), filepath.Join(r.bin, name)))
	}
}

// types runs the block of commands in a document that holds a text, after replacing what the reader has to fill in.
func (r *reader) types(file, text string, replace ...string) string {
	r.Helper()
	b, err := os.ReadFile(filepath.Join("../..", file))
	r.must(err)
	for _, block := range blocks(string(b)) {
		if !strings.Contains(block, text) {
			continue
		}
		// The image and AWS's certificate are the lab's.
		lab := "deploy/chart -f e2e/cluster/values.yaml --set podAnnotations.image=" + r.daemonImage
		block = strings.NewReplacer(append([]string{"<your image>", "test.local/imdsgate", "deploy/chart", lab}, replace...)...).Replace(block)
		return r.run(block)
	}
	r.Fatalf("%s has no block with %q", file, text)
	return ""
}

// run runs commands in the shell, at the top of the checkout.
func (r *reader) run(commands string) string {
	r.Helper()
	home := r.TempDir()
	cmd := exec.CommandContext(r.ctx, "bash", "-euo", "pipefail", "-c", commands)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "PATH="+r.bin+":"+os.Getenv("PATH"), "KUBECONFIG="+r.dir+"/kubeconfig", "AWS_EC2_METADATA_DISABLED=true",
		"HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	out, err := cmd.CombinedOutput()
	if err != nil {
		r.Fatalf("%v\n%s\n%s", err, commands, out)
	}
	return string(out)
}

// blocks are the indented blocks of a Markdown text.
func blocks(text string) (all []string) {
	var block strings.Builder
	for line := range strings.Lines(text + "\n") {
		if code, ok := strings.CutPrefix(line, "    "); ok {
			block.WriteString(code)
		} else if block.Len() > 0 {
			all = append(all, block.String())
			block.Reset()
		}
	}
	return all
}

// waitPods waits until the daemons of the first n nodes are ready.
func (s *scenario) waitPods(n int) {
	s.Helper()
	for {
		out := s.kubectl("-n", namespace, "get", "daemonset", release, "-o", "jsonpath={.status.numberReady}/{.status.desiredNumberScheduled}")
		if out == fmt.Sprintf("%d/%d", n, n) {
			return
		}
		select {
		case <-s.ctx.Done():
			s.Fatalf("%s daemons are ready, want %d", out, n)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
