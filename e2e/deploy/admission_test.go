package deploy_test

import (
	"context"
	"encoding/json"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// releaseNamespace is where the tests install the chart.
const releaseNamespace = "imdsgate-chart"

// install creates the objects at the API server, which refuses what it does not know (fieldValidation Strict).
func install(t *testing.T, all objects) {
	t.Helper()
	ctx := labtest.Context(t)
	paths := map[string]string{
		"ServiceAccount":                   "/api/v1/namespaces/" + releaseNamespace + "/serviceaccounts",
		"DaemonSet":                        "/apis/apps/v1/namespaces/" + releaseNamespace + "/daemonsets",
		"ClusterRole":                      "/apis/rbac.authorization.k8s.io/v1/clusterroles",
		"ClusterRoleBinding":               "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
		"ValidatingAdmissionPolicy":        "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies",
		"ValidatingAdmissionPolicyBinding": "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings",
	}
	client := shared.Kube.CoreV1().RESTClient()
	for _, o := range all {
		path, ok := paths[o.GetKind()]
		if !ok {
			t.Fatalf("where does a %s go?", o.GetKind())
		}
		body, err := o.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		err = client.Post().AbsPath(path).Param("fieldValidation", "Strict").SetHeader("Content-Type", "application/json").Body(body).Do(ctx).Error()
		if err != nil {
			t.Fatalf("create %s %s: %v", o.GetKind(), o.GetName(), err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if err := client.Delete().AbsPath(path, o.GetName()).Do(ctx).Error(); err != nil {
				t.Errorf("delete %s %s: %v", o.GetKind(), o.GetName(), err)
			}
		})
	}
}

// daemonPod makes a pod of the DaemonSet on the node, and returns the token that kubelet would mount into it.
func daemonPod(t *testing.T, n *lab.Node) string {
	t.Helper()
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: releaseNamespace, ServiceAccount: "imdsgate", HostNetwork: true})
	return accountToken(t, &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: p.Name, UID: p.UID})
}

// accountToken is one of the daemon's service account.
func accountToken(t *testing.T, bound *authenticationv1.BoundObjectReference) string {
	t.Helper()
	answer, err := shared.Kube.CoreV1().ServiceAccounts(releaseNamespace).CreateToken(labtest.Context(t), "imdsgate",
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: bound}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return answer.Status.Token
}

// clientOf speaks to the API server with the token, from the node.
func clientOf(t *testing.T, n *lab.Node, token string) kubernetes.Interface {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", n.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(&rest.Config{
		Host: config.Host, BearerToken: token, QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{CAData: config.CAData, CAFile: config.CAFile},
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			return n.Net.Dial(ctx, network, address)
		},
		Proxy: http.ProxyURL(nil),
	})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// kubeconfigOf is a file for a daemon on the node, with the token.
func kubeconfigOf(t *testing.T, n *lab.Node, token string) string {
	t.Helper()
	config, err := clientcmd.LoadFromFile(n.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	for _, user := range config.AuthInfos {
		user.Token, user.TokenFile = token, ""
	}
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// inForce waits until a new policy denies what it must: the API server learns of it by a watch of its own.
func inForce(t *testing.T, policy string, forbidden func() error) {
	t.Helper()
	ctx := labtest.Context(t)
	for tick := time.NewTicker(50 * time.Millisecond); ; {
		err := forbidden()
		if err != nil && strings.Contains(err.Error(), "ValidatingAdmissionPolicy '"+policy+"'") {
			tick.Stop()
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("policy %s never came into force: %v", policy, err)
		case <-tick.C:
		}
	}
}

// verdict compares an answer with the wanted one: "" for success, or what the refusal says.
func verdict(t *testing.T, what string, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("%s is refused: %v", what, err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("%s: err = %v, want a refusal that says %q", what, err, want)
	case want != "" && !apierrors.IsInvalid(err) && !apierrors.IsForbidden(err):
		t.Errorf("%s: status %v", what, apierrors.ReasonForError(err))
	}
}

// What the daemon's service account may do with tokens and nodes is what the policies leave of its rights. Everybody else's
// are as before.
func TestAdmission(t *testing.T) {
	ctx := labtest.Context(t)
	if err := shared.Namespace(ctx, releaseNamespace, nil); err != nil {
		t.Fatal(err)
	}
	_, all := template(t, releaseNamespace, "--set", "flags.issuer=web-identity", "--set", "flags.audiences={sts.amazonaws.com,sts.example}",
		"--set", "tokenPolicy.maxExpirationSeconds=3600", "--set", "startupTaint="+taint)
	install(t, all)
	own, other := labtest.Node(t, shared, lab.NodeOptions{}), labtest.Node(t, shared, lab.NodeOptions{})
	token := daemonPod(t, own)
	daemon := clientOf(t, own, token)

	t.Run("tokens", func(t *testing.T) { testTokens(t, own, daemon) })
	t.Run("nodes", func(t *testing.T) { testNodes(t, own, other, daemon) })
	t.Run("daemon", func(t *testing.T) { testDaemon(t, own, token, all) })
}

func testTokens(t *testing.T, n *lab.Node, daemon kubernetes.Interface) {
	ctx := labtest.Context(t)
	p := labtest.Pod(t, n, lab.PodSpec{ServiceAccount: "cart"})
	pod := &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: p.Name, UID: p.UID}
	sts := []string{"sts.amazonaws.com"}
	create := func(client kubernetes.Interface, bound *authenticationv1.BoundObjectReference, audiences []string, seconds int64) error {
		_, err := client.CoreV1().ServiceAccounts(p.Namespace).CreateToken(ctx, p.ServiceAccount,
			&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: audiences, BoundObjectRef: bound, ExpirationSeconds: &seconds}}, metav1.CreateOptions{})
		return err
	}
	inForce(t, "imdsgate-tokens", func() error { return create(daemon, nil, sts, 600) })

	secret, err := shared.Kube.CoreV1().Secrets(p.Namespace).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	const bound, audience, long = "tokens bound to a pod", "audiences sts.amazonaws.com, sts.example only", "at most 3600 seconds"
	for _, c := range []struct {
		name      string
		bound     *authenticationv1.BoundObjectReference
		audiences []string
		seconds   int64
		want      string
	}{
		{"what the daemon asks for", pod, sts, 600, ""},
		{"the other audience, the longest", pod, []string{"sts.example"}, 3600, ""},
		{"both audiences", pod, []string{"sts.amazonaws.com", "sts.example"}, 600, ""},
		{"unbound", nil, sts, 600, bound},
		{"bound to a secret", &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Secret", Name: secret.Name, UID: secret.UID}, sts, 600, bound},
		{"bound to a node", &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Node", Name: n.Name}, sts, 600, bound},
		{"bound by name alone", &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: p.Name}, sts, 600, bound},
		{"no audience: the API server's", pod, nil, 600, audience},
		{"the API server's audience", pod, []string{"https://kubernetes.default.svc"}, 600, audience},
		{"one audience too many", pod, []string{"sts.amazonaws.com", "vault"}, 600, audience},
		{"a prefix of an audience", pod, []string{"sts"}, 600, audience},
		{"too long", pod, sts, 3601, long},
	} {
		verdict(t, c.name, create(daemon, c.bound, c.audiences, c.seconds), c.want)
	}
	verdict(t, "the administrator's unbound token", create(shared.Kube, nil, []string{"vault"}, 7200), "")
}

func testNodes(t *testing.T, own, other *lab.Node, daemon kubernetes.Interface) {
	ctx := labtest.Context(t)
	nodes := shared.Kube.CoreV1().Nodes()
	startup := corev1.Taint{Key: taint, Effect: corev1.TaintEffectNoSchedule}
	evict := corev1.Taint{Key: taint, Effect: corev1.TaintEffectNoExecute}
	foreign := corev1.Taint{Key: "dedicated", Value: "db", Effect: corev1.TaintEffectNoSchedule}
	before := []corev1.Taint{startup, foreign, evict}
	for _, n := range []*lab.Node{own, other} {
		patch, _ := json.Marshal(map[string]any{"spec": map[string]any{"taints": before}})
		if _, err := nodes.Patch(ctx, n.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	try := func(client kubernetes.Interface, node string, ops ...map[string]any) error {
		patch, err := json.Marshal(ops)
		if err != nil {
			t.Fatal(err)
		}
		_, err = client.CoreV1().Nodes().Patch(ctx, node, types.JSONPatchType, patch, metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	set := func(path string, value any) map[string]any {
		return map[string]any{"op": "add", "path": path, "value": value}
	}
	taints := func(left ...corev1.Taint) map[string]any { return set("/spec/taints", left) }
	inForce(t, "imdsgate-startup-taint", func() error { return try(daemon, other.Name, set("/metadata/labels/x", "y")) })

	const node, only, spec, metadata = "the node that it runs on only", "remove the taint " + taint + " only", "nothing in a node's spec", "a node's metadata"
	for _, c := range []struct {
		name, node string
		op         map[string]any
		want       string
	}{
		{"its taint, both effects", own.Name, taints(foreign), ""},
		{"nothing at all", own.Name, taints(before...), ""},
		{"one effect only", own.Name, taints(foreign, evict), only},
		{"a foreign taint", own.Name, taints(startup, evict), only},
		{"all taints", own.Name, map[string]any{"op": "remove", "path": "/spec/taints"}, only},
		{"a new taint", own.Name, taints(foreign, corev1.Taint{Key: "new", Effect: corev1.TaintEffectNoSchedule}), only},
		{"a foreign taint's value", own.Name, taints(corev1.Taint{Key: "dedicated", Value: "all", Effect: corev1.TaintEffectNoSchedule}), only},
		{"cordon", own.Name, set("/spec/unschedulable", true), spec},
		{"provider ID", own.Name, set("/spec/providerID", "aws:///x/i-1"), spec},
		{"label", own.Name, set("/metadata/labels/node-role.kubernetes.io~1control-plane", ""), metadata},
		{"label away", own.Name, map[string]any{"op": "remove", "path": "/metadata/labels/kubernetes.io~1hostname"}, metadata},
		{"annotation", own.Name, set("/metadata/annotations", map[string]string{"x": "y"}), metadata},
		{"finalizer", own.Name, set("/metadata/finalizers", []string{"x.example/y"}), metadata},
		{"owner", own.Name, set("/metadata/ownerReferences", []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "x", UID: "y"}}), metadata},
		{"another node's taint", other.Name, taints(foreign), node},
	} {
		verdict(t, c.name, try(daemon, c.node, c.op), c.want)
	}
	verdict(t, "a token that names no node", try(clientOf(t, own, accountToken(t, nil)), own.Name, taints(foreign)), node)
	verdict(t, "another node's daemon", try(clientOf(t, own, daemonPod(t, other)), own.Name, taints(foreign)), node)
	verdict(t, "its own node's", try(clientOf(t, own, daemonPod(t, other)), other.Name, taints(foreign)), "")
	verdict(t, "the administrator's label", try(shared.Kube, own.Name, set("/metadata/labels/x", "y")), "")
	if err := daemon.CoreV1().Nodes().Delete(ctx, other.Name, metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("the daemon deletes a node: %v", err)
	}
}

// The real daemon with the chart's environment, rights, capabilities and account: it becomes ready, removes its taint alone, and
// its pods get their roles.
func testDaemon(t *testing.T, n *lab.Node, token string, all objects) {
	ctx := labtest.Context(t)
	kubeconfig := kubeconfigOf(t, n, token)
	container := get[appsv1.DaemonSet](t, all, "DaemonSet").Spec.Template.Spec.Containers[0]
	env := environment(container)
	var ips []string
	for _, ip := range n.Addrs() {
		ips = append(ips, ip.String())
	}
	env["NODE_NAME"], env["HOST_IP"], env["AWS_REGION"] = n.Name, strings.Join(ips, ","), lab.Region
	var list []string
	for _, name := range slices.Sorted(maps.Keys(env)) {
		list = append(list, name+"="+env[name])
	}
	var caps string
	for _, c := range container.SecurityContext.Capabilities.Add {
		caps += ",+" + strings.ToLower(string(c))
	}
	d := labtest.Launch(t, n, lab.DaemonOptions{
		Bare: true, Env: list, Flags: append([]string{"-kubeconfig", kubeconfig}, container.Args...),
		Wrap: []string{"setpriv", "--bounding-set=-all" + caps, "--inh-caps=-all" + caps, "--no-new-privs"},
	})
	if err := d.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}

	watch, err := shared.Kube.CoreV1().Nodes().Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + n.Name})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()
	for e := range watch.ResultChan() {
		node, ok := e.Object.(*corev1.Node)
		if !ok {
			t.Fatalf("the watch says %v", e.Object)
		}
		if slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == taint }) {
			continue
		}
		if diff := cmp.Diff([]corev1.Taint{{Key: "dedicated", Value: "db", Effect: corev1.TaintEffectNoSchedule}}, node.Spec.Taints); diff != "" {
			t.Errorf("the taints that stay (-want +got):\n%s", diff)
		}
		break
	}

	shop := shared.Unique("shop")
	role, err := n.Role("team/chart", aws.ActionListBuckets)
	if err != nil {
		t.Fatal(err)
	}
	if err := shared.ServiceAccount(ctx, shop, "cart", map[string]string{"eks.amazonaws.com/role-arn": role}); err != nil {
		t.Fatal(err)
	}
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	resp, err := p.HTTP().Get("http://169.254.169.254/latest/meta-data/iam/security-credentials/chart")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("the pod's credentials: %s\n%s", resp.Status, d.Log().Tail(20))
	}
}

// Mode cleanup: the init container takes the rules away; the container that then says Ready brings none back, although it may do
// nothing at the API server, and asks AWS for nothing.
func TestCleanupMode(t *testing.T) {
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	rules := func() string {
		t.Helper()
		var all strings.Builder
		for _, command := range [][]string{{"ip", "-4", "rule"}, {"ip", "-6", "rule"}, {"iptables", "-S"}, {"iptables", "-t", "nat", "-S"}, {"ip6tables", "-S"}, {"ip6tables", "-t", "nat", "-S"}} {
			out, err := n.Run(ctx, command[0], command[1:]...)
			if err != nil {
				t.Fatal(err)
			}
			all.WriteString(out)
		}
		return all.String()
	}
	before := rules()
	d := labtest.Daemon(t, n)
	if rules() == before {
		t.Fatal("the daemon installs nothing")
	}
	d.Kill()

	_, all := template(t, releaseNamespace, "--set", "mode=cleanup")
	pod := get[appsv1.DaemonSet](t, all, "DaemonSet").Spec.Template.Spec
	code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Bare: true, Flags: pod.InitContainers[0].Args})
	if err != nil || code != 0 {
		t.Fatalf("%v: code %d, %v\n%s", pod.InitContainers[0].Args, code, err, out)
	}
	if diff := cmp.Diff(before, rules()); diff != "" {
		t.Errorf("rules (-before +after):\n%s", diff)
	}

	ns, calls := shared.Unique("powerless"), len(n.AWS.Calls())
	if err := shared.ServiceAccount(ctx, ns, "imdsgate", nil); err != nil {
		t.Fatal(err)
	}
	answer, err := shared.Kube.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "imdsgate", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	env := environment(pod.Containers[0])
	idle := labtest.Launch(t, n, lab.DaemonOptions{
		Bare: true, Env: []string{"NODE_NAME=" + n.Name, "AWS_REGION=" + env["AWS_REGION"]},
		Flags: append(slices.Clone(pod.Containers[0].Args), "-kubeconfig", kubeconfigOf(t, n, answer.Status.Token)),
		Wrap:  []string{"setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"},
	})
	if _, err := idle.Log().Wait(ctx, "forbidden"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, rules()); diff != "" {
		t.Errorf("the waiting container changes rules (-before +after):\n%s", diff)
	}
	if got := n.AWS.Calls(); len(got) != calls {
		t.Errorf("the waiting container asks AWS: %v", got[calls:])
	}
	if err := idle.Stop(ctx); err != nil {
		t.Error(err)
	}
}
