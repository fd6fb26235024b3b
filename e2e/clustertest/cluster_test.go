package clustertest_test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/cluster/control"
	"github.com/imdsgate/imdsgate/e2e/clustertest"
	"github.com/imdsgate/imdsgate/e2e/imds"
)

var shared *clustertest.Cluster

func TestMain(m *testing.M) {
	os.Exit(clustertest.Main(m, clustertest.Options{}, func(c *clustertest.Cluster) { shared = c }))
}

const (
	endpoint = "http://169.254.169.254/latest/"
	roleList = endpoint + "meta-data/iam/security-credentials/"
)

// askEndpoint is what an SDK does: a token, the role list, the document.
const askEndpoint = `t=$(curl -sSf -m 3 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' ` + endpoint + `api/token) || exit 1
r=$(curl -sSf -m 3 -H "X-aws-ec2-metadata-token: $t" ` + roleList + `) || exit 1
curl -sSf -m 3 -H "X-aws-ec2-metadata-token: $t" ` + roleList + `$r | sed -n 's/.*"AccessKeyId" *: *"\([^"]*\)".*/\1/p'`

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// workload is a pod of each service account on every node; the CLI in it.
func workload(namespace, account string, hostNetwork bool) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: %[2]s, namespace: %[1]s}
spec:
  selector: {matchLabels: {app: %[2]s}}
  template:
    metadata: {labels: {app: %[2]s}}
    spec:
      serviceAccountName: %[2]s
      hostNetwork: %[3]t
      terminationGracePeriodSeconds: 0
      tolerations: [{operator: Exists}]
      containers: [{name: main, image: test.local/aws:1, imagePullPolicy: Never, command: [sleep, "86400"]}]
`, namespace, account, hostNetwork)
}

func deploy(t *testing.T, namespace, account string, annotations map[string]string, hostNetwork bool) {
	t.Helper()
	must(t, shared.ServiceAccount(t.Context(), namespace, account, annotations))
	must(t, shared.Apply(t.Context(), workload(namespace, account, hostNetwork)))
	rolledOut(t, namespace, account)
}

func rolledOut(t *testing.T, namespace, name string) {
	t.Helper()
	_, err := shared.Kubectl(t.Context(), "rollout", "status", "-n", namespace, "daemonset/"+name, "--timeout=60s")
	must(t, err)
}

func namespace(t *testing.T, name string, annotations map[string]string) {
	t.Helper()
	must(t, shared.Namespace(t.Context(), name, annotations))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := shared.Kubectl(ctx, "delete", "namespace", name, "--timeout=50s"); err != nil {
			t.Error(err)
		}
	})
}

// The cluster is what it says: pods on every node, names, and what is wrong with metadata endpoints: every pod gets the node's
// own credentials.
func TestClusterUp(t *testing.T) {
	ctx := t.Context()
	const ns = "test-up"
	namespace(t, ns, nil)
	deploy(t, ns, "pod", nil, false)
	deploy(t, ns, "host", nil, true)
	for _, app := range []string{"pod", "host"} {
		pods, err := shared.Pods(ctx, ns, "app="+app)
		must(t, err)
		if len(pods) < 2 {
			t.Fatalf("%s runs on %d nodes", app, len(pods))
		}
		for node, p := range pods {
			key, err := shared.Exec(ctx, ns, p.Name, "sh", "-c", askEndpoint)
			must(t, err)
			owner, err := shared.Fabric.Owner(ctx, strings.TrimSpace(key))
			must(t, err)
			if want := fmt.Sprintf("node%d", owner.NodeIndex); !owner.Node || want != node {
				t.Errorf("the %s pod on %s has credentials of %+v", app, node, owner)
			}
		}
	}
	pods, err := shared.Pods(ctx, ns, "app=pod")
	must(t, err)
	for node, p := range pods {
		for name, want := range map[string]string{
			"kubernetes.default.svc.cluster.local": "10.96.0.1 ",
			"kube-dns.kube-system":                 "10.96.0.10 ",
			"sts.us-east-1.amazonaws.com":          control.AWS.String() + " ",
		} {
			if out, err := shared.Exec(ctx, ns, p.Name, "getent", "hosts", name); err != nil || !strings.HasPrefix(out, want) {
				t.Errorf("%s in a pod on %s: %v %q, want %s", name, node, err, out, want)
			}
		}
		if out, err := shared.Exec(ctx, ns, p.Name, "getent", "hosts", "nobody.example"); err == nil {
			t.Errorf("nobody.example in a pod on %s: %q", node, out)
		}
	}
	p := pods["node1"]
	// One node's pod reaches another's, and the API server by its service's address.
	if _, err := shared.Exec(ctx, ns, p.Name, "ping", "-c1", "-W2", pods["node2"].Status.PodIP); err != nil {
		t.Error(err)
	}
	if out, err := shared.Exec(ctx, ns, p.Name, "curl", "-sk", "-m5", "https://10.96.0.1/version"); err != nil || !strings.Contains(out, "gitVersion") {
		t.Errorf("the API server from a pod: %v %s", err, out)
	}
}

// The chart on a dual-stack cluster of its own: both families lead to the daemon.
func TestClusterDualStack(t *testing.T) {
	ctx := t.Context()
	c, err := clustertest.Up(ctx, clustertest.Options{Name: "imdsgate-dual", Nodes: 1, DualStack: true})
	t.Cleanup(func() {
		if c != nil {
			must(t, c.Down(context.Background()))
		}
	})
	must(t, err)
	role, err := c.Fabric.Role(ctx, "team/cart", aws.ActionListBuckets)
	must(t, err)
	must(t, c.Namespace(ctx, "shop", map[string]string{"iam.amazonaws.com/allowed-roles": `["` + role + `"]`}))
	must(t, c.ServiceAccount(ctx, "shop", "cart", map[string]string{"eks.amazonaws.com/role-arn": role}))
	must(t, c.Apply(ctx, workload("shop", "cart", false)))
	_, err = c.Kubectl(ctx, "rollout", "status", "-n", "shop", "daemonset/cart", "--timeout=60s")
	must(t, err)
	must(t, c.BuildDaemon(ctx))
	must(t, c.Install(ctx))
	mark, err := c.Mark(ctx)
	must(t, err)
	pods, err := c.Pods(ctx, "shop", "app=cart")
	must(t, err)
	if ips := pods["node1"].Status.PodIPs; len(ips) != 2 {
		t.Fatalf("the pod has the addresses %v", ips)
	}
	for _, host := range []string{"169.254.169.254", "[fd00:ec2::254]"} {
		script := strings.ReplaceAll(askEndpoint, "169.254.169.254", host)
		key, err := c.Exec(ctx, "shop", pods["node1"].Name, "sh", "-c", strings.ReplaceAll(script, "curl ", "curl -g "))
		if err != nil {
			t.Errorf("%s: %v", host, err)
			continue
		}
		if owner, err := c.Fabric.Owner(ctx, strings.TrimSpace(key)); err != nil || owner.RoleARN != role {
			t.Errorf("%s answers credentials of %+v %v", host, owner, err)
		}
	}
	mark.AssertUntouched(t, imds.Expected{NodeRole: true})
}

// A node that loses its power and boots is the same Node, and its pods come back.
func TestClusterNodeBoots(t *testing.T) {
	ctx := t.Context()
	const ns = "test-boot"
	namespace(t, ns, nil)
	deploy(t, ns, "pod", nil, false)
	node := shared.Node(2)
	before, err := shared.Kube.CoreV1().Nodes().Get(ctx, node.Name, metav1.GetOptions{})
	must(t, err)
	pods, err := shared.Pods(ctx, ns, "app=pod")
	must(t, err)
	pod := pods[node.Name]

	must(t, node.Down(ctx))
	if out, err := node.Run(ctx, "true"); err == nil {
		t.Errorf("the node is down and runs a program: %s", out)
	}
	start := time.Now()
	must(t, node.Up(ctx, clustertest.Options{}))
	t.Logf("booted in %v", time.Since(start).Round(100*time.Millisecond))
	after, err := shared.Kube.CoreV1().Nodes().Get(ctx, node.Name, metav1.GetOptions{})
	must(t, err)
	if after.UID != before.UID || after.Status.NodeInfo.BootID == "" {
		t.Errorf("the node is another one: %s, was %s", after.UID, before.UID)
	}
	_, err = shared.Kubectl(ctx, "wait", "-n", ns, "pod/"+pod.Name, "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", "--timeout=60s")
	must(t, err)
	_, err = shared.Kubectl(ctx, "wait", "-n", ns, "pod/"+pod.Name, "--for=condition=Ready", "--timeout=60s")
	must(t, err)
	back, err := shared.Kube.CoreV1().Pods(ns).Get(ctx, pod.Name, metav1.GetOptions{})
	must(t, err)
	if back.UID != pod.UID {
		t.Errorf("the pod is another one")
	}
	t.Logf("its pod is back %v after the boot began", time.Since(start).Round(100*time.Millisecond))
	if out, err := shared.Exec(ctx, ns, pod.Name, "hostname"); err != nil || strings.TrimSpace(out) != pod.Name {
		t.Errorf("exec in the pod after the boot: %v %s", err, out)
	}
}

// The chart on real nodes: the two founding scenarios on each, and nothing of it left afterwards.
func TestClusterInstall(t *testing.T) {
	ctx := t.Context()
	rules := func() (all string) {
		for i := 1; i <= 2; i++ {
			for _, command := range []string{"ip rule", "ip -6 rule", "iptables-save -t nat", "iptables-save -t filter", "ip6tables-save"} {
				out, err := shared.Node(i).Run(ctx, strings.Fields(command)...)
				must(t, err)
				for line := range strings.Lines(out) {
					// Counters, dates and the chains of kube-proxy, which change by themselves.
					if !strings.HasPrefix(line, "#") && !strings.Contains(line, "KUBE-") && !strings.Contains(line, "CNI-") && !strings.HasPrefix(line, ":") {
						all += fmt.Sprintf("node%d: %s", i, line)
					}
				}
			}
		}
		return all
	}
	const ns = "test-install"
	role, err := shared.Fabric.Role(ctx, "team/cart", aws.ActionListBuckets)
	must(t, err)
	namespace(t, ns, map[string]string{"iam.amazonaws.com/allowed-roles": `["` + role + `"]`})
	deploy(t, ns, "cart", map[string]string{"eks.amazonaws.com/role-arn": role}, false)
	deploy(t, ns, "visitor", nil, false)
	before := rules()

	must(t, shared.BuildDaemon(ctx))
	start := time.Now()
	must(t, shared.Install(ctx))
	t.Logf("installed in %v", time.Since(start).Round(100*time.Millisecond))
	mark, err := shared.Mark(ctx)
	must(t, err)

	carts, err := shared.Pods(ctx, ns, "app=cart")
	must(t, err)
	visitors, err := shared.Pods(ctx, ns, "app=visitor")
	must(t, err)
	if len(carts) < 2 || len(visitors) < 2 {
		t.Fatalf("pods on %d and %d nodes", len(carts), len(visitors))
	}
	for node, p := range carts {
		out, err := shared.Exec(ctx, ns, p.Name, "aws", "s3", "ls")
		if err != nil || !strings.Contains(out, "ledger") {
			t.Errorf("aws s3 ls on %s: %v %s", node, err, out)
		}
		key, err := shared.Exec(ctx, ns, p.Name, "sh", "-c", askEndpoint)
		must(t, err)
		if owner, err := shared.Fabric.Owner(ctx, strings.TrimSpace(key)); err != nil || owner.Node || owner.RoleARN != role {
			t.Errorf("the pod on %s has credentials of %+v %v, want %s", node, owner, err, role)
		}
	}
	for node, p := range visitors {
		if out, err := shared.Exec(ctx, ns, p.Name, "aws", "s3", "ls"); err == nil || !strings.Contains(err.Error(), "Unable to locate credentials") {
			t.Errorf("aws s3 ls without a role on %s: %v %s", node, err, out)
		}
		if out, err := shared.Exec(ctx, ns, p.Name, "curl", "-s", "-m3", "-o/dev/null", "-w%{http_code}", roleList); err != nil || out != fmt.Sprint(http.StatusNotFound) {
			t.Errorf("the role list without a role on %s: %v %s", node, err, out)
		}
	}
	mark.AssertUntouched(t, imds.Expected{NodeRole: true})

	must(t, shared.Uninstall(ctx))
	if after := rules(); after != before {
		t.Errorf("rules before and after differ:\n%s\n---\n%s", before, after)
	}
	// Open again, as its notes say: AssertUntouched can fail.
	if _, err := shared.Exec(ctx, ns, visitors["node1"].Name, "sh", "-c", askEndpoint); err != nil {
		t.Error(err)
	}
	if found, err := mark.Reached(ctx, imds.Expected{NodeRole: true}); err != nil || len(found) == 0 {
		t.Errorf("a pod asked the real endpoint, and nothing is said to have reached it: %v", err)
	}
}
