package scenarios

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// cleanUp uninstalls as the notes say.
func (s *scenario) cleanUp() {
	s.Helper()
	s.helm("upgrade", release, chart, "--reuse-values", "--set", "mode=cleanup")
	s.rolledOut()
	s.helm("uninstall", release)
	s.gone()
}

// gone waits until no pod of the release is left.
func (s *scenario) gone() {
	s.Helper()
	s.kubectl("-n", namespace, "wait", "--for=delete", "pod", "-l", "app.kubernetes.io/name="+release, "--timeout=60s")
}

// Mode cleanup and helm uninstall leave nothing: iptables and routing rules are what they were before the first installation. A
// pod that asks now gets the node's role, as it would without imdsgate. helm uninstall alone leaves the node closed.
// An agent's stale rules that take pods' requests elsewhere do not keep a new installation from serving them.
func TestScenarioUninstall(t *testing.T) {
	s := beginScenario(t, 4*time.Minute)
	s.install()
	const ns = "uninstall"
	role := s.role("uninstall/app")
	s.newNamespace(ns, allowed(role))
	s.serviceAccount(ns, "app", role)
	for node := 1; node <= 2; node++ {
		name := fmt.Sprint("p", node)
		s.create(podSpec{namespace: ns, name: name, account: "app", node: node, args: []string{"idle"}})
		s.waitPod(ns, name, running)
		s.holds(s.ask(ns, name), role)
	}
	s.sealed()
	s.cleanUp()
	lines := 0
	for node := 1; node <= 2; node++ {
		after, err := rules(s.ctx, node)
		s.must(err)
		// kube-proxy may still have to hear that the release's Service is gone.
		for end := time.Now().Add(20 * time.Second); after != s.before[node] && time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
			after, err = rules(s.ctx, node)
			s.must(err)
		}
		if diff := cmp.Diff(s.before[node], after); diff != "" {
			t.Errorf("node %d is not what it was (-before +after):\n%s", node, diff)
		}
		lines += strings.Count(after, "\n")
		if r := s.ask(ns, fmt.Sprint("p", node)); r.Kind != sequence.OK || s.owner(r.AccessKeyID).NodeIndex != node {
			t.Errorf("node %d is clean, but a pod does not reach the node's endpoint: %s", node, r.Brief())
		}
	}

	// What an agent that was deleted without its rules leaves: they are ahead of everything, and nobody listens.
	for node := 1; node <= 2; node++ {
		s.onNode(node, "iptables", "-t", "nat", "-I", "PREROUTING", "!", "-i", "eth0", "-d", "169.254.169.254/32", "-p", "tcp", "--dport", "80",
			"-j", "DNAT", "--to-destination", fmt.Sprintf("172.30.0.1%d:8181", node))
	}
	s.install()
	s.breach()
	for node := 1; node <= 2; node++ {
		s.holds(s.ask(ns, fmt.Sprint("p", node)), role)
		// -check tells the operator.
		out, err := s.tryKubectl("-n", namespace, "exec", s.daemonPod(node), "--", "/imdsgate", "-check")
		if err == nil || !strings.Contains(out, "8181") {
			t.Errorf("node %d: -check does not name the other agent's rule: %v\n%s", node, err, out)
		}
		s.onNode(node, "iptables", "-t", "nat", "-D", "PREROUTING", "!", "-i", "eth0", "-d", "169.254.169.254/32", "-p", "tcp", "--dport", "80",
			"-j", "DNAT", "--to-destination", fmt.Sprintf("172.30.0.1%d:8181", node))
	}

	s.helm("uninstall", release)
	s.gone()
	for node := 1; node <= 2; node++ {
		if r := s.ask(ns, fmt.Sprint("p", node)); r.Kind != sequence.Refused {
			t.Errorf("node %d: helm uninstall alone does not leave it closed: %s", node, r.Brief())
		}
	}
	s.figures("after mode cleanup and helm uninstall %d lines of iptables, ip6tables and routing rules on 2 nodes are what they were; uninstalled alone, both nodes stay closed; stale DNAT rules of another agent survived", lines)
}

// daemonPod is the name of the daemon's pod on a node.
func (s *scenario) daemonPod(node int) string {
	s.Helper()
	names := strings.Fields(s.kubectl("-n", namespace, "get", "pods", "-l", "app.kubernetes.io/name="+release,
		"--field-selector=status.phase=Running,spec.nodeName="+nodeName(node), "-o", "name"))
	if len(names) == 0 {
		s.Fatalf("no daemon runs on node %d", node)
	}
	return names[0]
}

// Without one of its capabilities the daemon does not run, and says which one is missing. The rights of its service account are
// judged one by one in e2e/deploy.
func TestScenarioCapabilities(t *testing.T) {
	s := beginScenario(t, 3*time.Minute)
	s.install()
	s.cleanUp() // else it would find its rules in place
	var found []string
	for capability, backEnd := range map[string]string{"NET_ADMIN": "nft", "NET_RAW": "legacy"} {
		text := s.helm(slices.Concat([]string{"template", release, chart, "--set", "iptables=" + backEnd}, s.base())...)
		line := regexp.MustCompile(`(?m)^ *- ` + capability + ` .*\n`)
		if len(line.FindAllString(text, -1)) == 0 {
			t.Fatalf("%s is not in the manifest", capability)
		}
		file := filepath.Join(t.TempDir(), "manifest.yaml")
		s.must(os.WriteFile(file, []byte(line.ReplaceAllString(text, "")), 0o600))
		s.kubectl("-n", namespace, "apply", "-f", file)
		t.Cleanup(func() {
			if t.Failed() { // for the scenarios that follow; otherwise it is gone, and the same names are the release's
				s.kubectl("-n", namespace, "delete", "-f", file, "--ignore-not-found", "--wait=false")
			}
		})
		pod, container := "", ""
		failed := func(p *corev1.Pod) bool {
			for _, cs := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
				if t := cs.LastTerminationState.Terminated; t != nil && t.ExitCode != 0 {
					pod, container = p.Name, cs.Name
					return true
				}
			}
			return false
		}
		err := s.eachPod(namespace, "app.kubernetes.io/name="+release, failed)
		logs, _ := s.tryKubectl("-n", namespace, "logs", pod, "-c", container, "--previous")
		if err != nil || !strings.Contains(logs, capability) {
			t.Errorf("without %s: %v, and the log does not name it:\n%s", capability, err, logs)
		}
		found = append(found, fmt.Sprintf("without %s: %q", capability, regexp.MustCompile(`give the container[^"]*`+capability).FindString(logs)))
		s.kubectl("-n", namespace, "delete", "-f", file, "--wait=false")
		s.gone()
	}
	if t.Failed() {
		return
	}
	s.install()
	s.breach()
	slices.Sort(found)
	s.figures("%s", strings.Join(found, "; "))
}
