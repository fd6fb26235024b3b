package broken_test

import (
	"context"
	"fmt"
	"html"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// other is a set-up that no Event can tell of: the daemon never hears of the pod's request, or the fault is not a pod's.
type other struct{ symptom, says, fix, where string }

var others = map[string]other{
	"host network": {
		symptom: "a pod with hostNetwork",
		says:    "it uses the node's network (hostNetwork): it has no IP of its own and is never served, to the kernel it is the node",
		fix:     "take hostNetwork: true out of its template, or give it credentials in another way; the node's own role is what it has now",
		where:   "page, -check: its requests never come here",
	},
	"irsa": {
		symptom: "IRSA or EKS Pod Identity as well",
		says:    "its containers name another source of credentials (IRSA or EKS Pod Identity), so its SDKs will not ask here",
		fix:     "take AWS_WEB_IDENTITY_TOKEN_FILE or AWS_CONTAINER_CREDENTIALS_FULL_URI, and the webhook that sets it, away from the pod if imdsgate is to serve it",
		where:   "page, -check: it does not ask",
	},
	"disabled": {
		symptom: "AWS_EC2_METADATA_DISABLED, or keys in AWS_ACCESS_KEY_ID",
		says:    "its containers set AWS_EC2_METADATA_DISABLED: SDKs that heed it do not ask here",
		fix:     "take AWS_EC2_METADATA_DISABLED out of the template that the pod is made of, if imdsgate is to serve it",
		where:   "page, -check: it does not ask",
	},
	"proxy": {
		symptom: "a proxy, and not NO_PROXY",
		says:    "its containers set HTTP_PROXY and not NO_PROXY=169.254.169.254: SDKs that heed it ask the proxy for credentials",
		fix:     "add 169.254.169.254 to NO_PROXY of its containers",
		where:   "page, -check: it asks somebody else",
	},
	"ended": {
		symptom: "the pod has ended",
		says:    "its containers have ended: its IP may be another pod's; what it was refused is in its Events: kubectl describe pod -n",
		where:   "page, -check",
	},
	"events": {
		symptom: "the daemon may not write Events (RBAC)",
		says:    "the permission to create events is missing, see the ClusterRole of the chart",
		fix:     "let its ClusterRole create and patch events: without them nobody but the operator hears why a pod got nothing",
		where:   "-check, log; everything but Events works",
	},
	"nobody": {
		symptom: "no imdsgate runs on the node",
		says:    "none answers at -probe-socket: where none runs nobody is served, and what follows is what one with these settings would do",
		where:   "-check on the node",
	},
	"conflict": {
		symptom: "pod and service account name different roles (-pod-annotations)",
		says:    `which is used: remove one of them`,
		where:   "Event RoleConflict, page, -check; it is served the service account's role",
	},
	"capped": {
		symptom: "a longer session than the role allows",
		says:    "STS gives sessions of 1h, not of the 4h that were asked for",
		fix:     "raise the role's MaxSessionDuration, or ask for less",
		where:   "page, -check, log; it is served",
	},
	"permission": {
		symptom: "the daemon may not read service accounts (RBAC)",
		says:    "the permission to list serviceaccounts is missing, see the ClusterRole of the chart",
		where:   "page, -check, log; the pod hears 503",
	},
	"token": {
		symptom: "the daemon may not create tokens (RBAC, web-identity)",
		says:    "the permission to create serviceaccounts/token is missing, see the ClusterRole of the chart",
		fix:     "imdsgate must be allowed to create tokens of the service account: see the ClusterRole and the admission policy of its chart",
		where:   "answer 503 and Event CredentialsFailed with the fix alone, page, -check, log",
	},
	"foreign rule": {
		symptom: "a rule that kube2iam or kiam left",
		says:    "takes the endpoint: ",
		fix:     "uninstall kube2iam, kiam or whatever made it, and delete the rule",
		where:   "page, -check, log",
	},
	"other back end": {
		symptom: "kube2iam's or kiam's rule is in iptables-legacy, beside imdsgate's in nft",
		says:    "rules of the other back end (legacy) cannot be read, and one that takes the endpoint may be asked before ours",
		fix:     "on the node, iptables-legacy-save -t nat shows them: if one names 169.254.169.254, delete it, or use that back end too (chart: iptables)",
		where:   "page, -check",
	},
	"no region": {
		symptom: "no region",
		says:    "no AWS region is configured and the instance metadata endpoint does not tell one: set the environment variable AWS_REGION",
		where:   "log, -check; imdsgate does not start",
	},
	"node's name": {
		symptom: "a wrong -node or NODE_NAME",
		says:    "not even this one: set -node or NODE_NAME to spec.nodeName (downward API)",
		where:   "page, -check, log; pods hear 503",
	},
	"other node": {
		symptom: "-check on another node than the pod's",
		says:    "run -check in the imdsgate pod of that node; if there is none, nobody there serves it",
		where:   "-check",
	},
}

// tells fails the test unless page and -check say what is wanted of a pod.
func (o other) tells(t *testing.T, n *lab.Node, d *lab.Daemon, p *lab.Pod, wantCode int, flags ...string) {
	t.Helper()
	ctx := labtest.Context(t)
	page, err := d.Debug(ctx, "/?q="+url.QueryEscape(p.Namespace+"/"+p.Name))
	if err != nil {
		t.Fatal(err)
	}
	code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: append(flags, "-check", p.Namespace+"/"+p.Name)})
	if err != nil || code != wantCode {
		t.Errorf("-check ends with %d %v, want %d", code, err, wantCode)
	}
	for who, text := range map[string]string{"the page": html.UnescapeString(page), "-check": out} {
		if !strings.Contains(text, o.says) || !strings.Contains(text, o.fix) {
			t.Errorf("%s does not say %q and %q:\n%s", who, o.says, o.fix, text)
		}
	}
}

// pageThatSays is the status page, as soon as it says a text.
func pageThatSays(ctx context.Context, t *testing.T, d *lab.Daemon, says string) (page string) {
	t.Helper()
	labtest.Eventually(t, func() error {
		text, err := d.Debug(ctx, "/")
		if page = html.UnescapeString(text); err == nil && !strings.Contains(page, says) {
			err = fmt.Errorf("the page does not say %q: %s", says, page)
		}
		return err
	})
	return page
}

// TestNotBroken: what the page and -check say of pods that get nothing here, or not what was asked for, and that is all right.
func TestNotBroken(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	for _, name := range []string{"cart", "other"} {
		if _, err := n.Role(name); err != nil {
			t.Fatal(err)
		}
	}
	shop := shared.Unique("shop")
	if err := shared.Namespace(ctx, shop, permits); err != nil {
		t.Fatal(err)
	}
	for name, annotations := range map[string]map[string]string{
		"cart": {roleAnnotation: cart}, "long": {roleAnnotation: cart, "imdsgate.dev/session-duration": "4h"},
	} {
		if err := shared.ServiceAccount(ctx, shop, name, annotations); err != nil {
			t.Fatal(err)
		}
	}
	d := labtest.Daemon(t, n, "-pod-annotations")
	host := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart", HostNetwork: true})
	irsa := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart", Env: map[string]string{"AWS_WEB_IDENTITY_TOKEN_FILE": "/token"}})
	disabled := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart", Env: map[string]string{"AWS_EC2_METADATA_DISABLED": "true"}})
	proxied := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart", Env: map[string]string{"http_proxy": "http://proxy:3128"}})
	ended := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	if err := ended.SetStatus(ctx, corev1.PodSucceeded); err != nil {
		t.Fatal(err)
	}
	conflict := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart", Annotations: map[string]string{"iam.amazonaws.com/role": base + "other"}})
	long := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "long"})
	for _, p := range []*lab.Pod{conflict, long, disabled, proxied} {
		labtest.Eventually(t, func() error {
			_, err := answers(ctx, t, p, http.StatusOK, "")
			return err
		})
	}
	others["host network"].tells(t, n, d, host, 1)
	others["irsa"].tells(t, n, d, irsa, 0)
	others["disabled"].tells(t, n, d, disabled, 0)
	others["proxy"].tells(t, n, d, proxied, 0)
	others["ended"].tells(t, n, d, ended, 1)
	others["conflict"].tells(t, n, d, conflict, 0)
	others["capped"].tells(t, n, d, long, 0)
	e, err := conflict.WaitEvent(ctx, "RoleConflict")
	if err != nil || !strings.Contains(e.Message, others["conflict"].says) {
		t.Errorf("Event %+v, %v", e, err)
	}
	// Beside one that is broken, -check -all names it first and fails.
	code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: []string{"-check", "-all"}})
	if err != nil || code != 0 || !strings.Contains(out, " need attention") {
		t.Errorf("-check -all ends with %d %v: %s", code, err, out)
	}
	if err := shared.ServiceAccount(ctx, shop, "broken", map[string]string{roleAnnotation: "arn:aws:iam::1:role/x"}); err != nil {
		t.Fatal(err)
	}
	bad := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "broken"})
	code, out, err = n.RunDaemon(ctx, lab.DaemonOptions{Flags: []string{"-check", "-all"}})
	if err != nil || code != 1 || !strings.HasPrefix(out, shop+"/"+bad.Name+": refused\n") || !strings.Contains(out, ", 1 need attention") {
		t.Errorf("-check -all ends with %d %v: %s", code, err, out)
	}
}

// TestNobodyRuns: before imdsgate is installed, -check says what each pod would get, and asks STS for it.
func TestNobodyRuns(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	role, err := n.Role("dry")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.AWS.SetRole(aws.Role{ARN: base + "untrusting"}); err != nil {
		t.Fatal(err)
	}
	shop := shared.Unique("shop")
	if err := shared.Namespace(ctx, shop, permits); err != nil {
		t.Fatal(err)
	}
	for name, role := range map[string]string{"dry": role, "cart": base + "untrusting"} {
		if err := shared.ServiceAccount(ctx, shop, name, map[string]string{roleAnnotation: role}); err != nil {
			t.Fatal(err)
		}
	}
	good := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "dry"})
	bad := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	twin := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "dry"})
	for _, issuer := range []string{"assume-role", "web-identity"} {
		before := len(n.AWS.Calls())
		code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: []string{"-issuer", issuer, "-check", "-all"}})
		if err != nil || code != 1 {
			t.Errorf("%s ends with %d %v", issuer, code, err)
		}
		for _, want := range []string{
			others["nobody"].says, shop + "/" + good.Name + ": served\n", shop + "/" + twin.Name + ": served\n", "STS gives credentials for the role, valid for ",
			shop + "/" + bad.Name + ": failing\n", "AccessDenied", `add to its trust policy`,
		} {
			if !strings.Contains(out, want) {
				t.Errorf("%s: -check -all does not say %q:\n%s", issuer, want, out)
			}
		}
		if calls := n.AWS.Calls()[before:]; len(calls) != 2 {
			t.Errorf("%s: for two sessions STS was asked %d times", issuer, len(calls))
		}
		if strings.Contains(out, "AQoD") || strings.Contains(out, "ASIA") {
			t.Error("-check tells credentials")
		}
	}
	rules, err := n.Run(ctx, "sh", "-c", "iptables-save; ip rule")
	if err != nil || strings.Contains(rules, "IMDSGATE") || strings.Contains(rules, "169.254") {
		t.Errorf("-check left rules: %s %v", rules, err)
	}
	for _, wrong := range [][]string{{"-check", "nothing"}, {"-check", "a/b", "c/d"}, {"-check", "-nodename=x"}} {
		if code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: wrong}); err != nil || code != 2 {
			t.Errorf("%v ends with %d %v: %s", wrong, code, err, out)
		}
	}
}

// TestPermissionMissing: without a right of the daemon's the pod hears 503, and the operator which right it is.
func TestPermissionMissing(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	var fewer []rbacv1.PolicyRule
	for _, r := range lab.Permissions {
		r.Resources = slices.DeleteFunc(slices.Clone(r.Resources), func(s string) bool { return s == "serviceaccounts" })
		fewer = append(fewer, r)
	}
	if err := n.SetPermissions(ctx, fewer); err != nil {
		t.Fatal(err)
	}
	p := labtest.Pod(t, n, lab.PodSpec{ServiceAccount: "cart"})
	d := labtest.Launch(t, n, lab.DaemonOptions{})
	labtest.Eventually(t, func() error {
		_, err := answers(ctx, t, p, http.StatusServiceUnavailable, "")
		return err
	})
	if !strings.Contains(pageThatSays(ctx, t, d, others["permission"].says), "Not ready") {
		t.Error("the page says it is ready")
	}
	others["permission"].tells(t, n, d, p, 1)
	code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: []string{"-check"}})
	if err != nil || code != 1 || !strings.Contains(out, others["permission"].says) {
		t.Errorf("-check ends with %d %v: %s", code, err, out)
	}
}

// TestEventsForbidden: pods are answered without the right to write Events, and the operator hears that nobody else hears anything.
func TestEventsForbidden(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	if err := n.SetPermissions(ctx, slices.DeleteFunc(slices.Clone(lab.Permissions), func(r rbacv1.PolicyRule) bool {
		return slices.Contains(r.Resources, "events")
	})); err != nil {
		t.Fatal(err)
	}
	d := labtest.Daemon(t, n)
	o := others["events"]
	code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: []string{"-check"}})
	if err != nil || code != 0 || !strings.Contains(out, o.says) || !strings.Contains(out, "fix: "+o.fix) {
		t.Errorf("-check ends with %d %v: %s", code, err, out)
	}
	p := labtest.Pod(t, n, lab.PodSpec{ServiceAccount: "cart"})
	labtest.Eventually(t, func() error {
		_, err := answers(ctx, t, p, http.StatusNotFound, "")
		return err
	})
	if _, err := d.Log().Wait(ctx, "cannot write an event", o.says); err != nil {
		t.Error(err)
	}
	// With it nothing is said, and nothing is written.
	if err := n.SetPermissions(ctx, lab.Permissions); err != nil {
		t.Fatal(err)
	}
	for code, out = 0, o.says; err == nil && strings.Contains(out, o.says) && ctx.Err() == nil; {
		code, out, err = n.RunDaemon(ctx, lab.DaemonOptions{Flags: []string{"-check"}})
	}
	if err != nil || code != 0 || strings.Contains(out, "events") {
		t.Errorf("-check ends with %d %v: %s", code, err, out)
	}
	if list, err := shared.Kube.CoreV1().Events(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{}); err != nil || slices.ContainsFunc(list.Items, func(e corev1.Event) bool {
		return e.Source.Component == "imdsgate"
	}) {
		t.Errorf("-check wrote an Event: %v %v", list.Items, err)
	}
}

// TestTokenForbidden: a pod's owner is told that it is the operator's to mend, and the operator what.
func TestTokenForbidden(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	if err := n.SetPermissions(ctx, slices.DeleteFunc(slices.Clone(lab.Permissions), func(r rbacv1.PolicyRule) bool {
		return slices.Contains(r.Resources, "serviceaccounts/token")
	})); err != nil {
		t.Fatal(err)
	}
	shop := shared.Unique("shop")
	if err := shared.ServiceAccount(ctx, shop, "cart", map[string]string{roleAnnotation: cart}); err != nil {
		t.Fatal(err)
	}
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	d := labtest.Daemon(t, n, "-issuer", "web-identity")
	o := others["token"]
	labtest.Eventually(t, func() error {
		_, err := answers(ctx, t, p, http.StatusServiceUnavailable, o.fix)
		return err
	})
	e, err := p.WaitEvent(ctx, "CredentialsFailed")
	if err != nil || !strings.Contains(e.Message, o.fix) {
		t.Errorf("Event %+v, %v", e, err)
	}
	o.tells(t, n, d, p, 1)
}

// TestForeignRule: the rule of an agent that is gone is named by the page and by -check.
func TestForeignRule(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	d := labtest.Daemon(t, n)
	if _, err := n.Run(ctx, "iptables", "-t", "nat", "-A", "PREROUTING", "-d", "169.254.169.254/32", "-i", "cali+", "-p", "tcp", "--dport", "80",
		"-j", "DNAT", "--to-destination", n.IP.String()+":8181"); err != nil {
		t.Fatal(err)
	}
	o := others["foreign rule"]
	page := pageThatSays(ctx, t, d, o.says) // it looks at the rules every ten seconds
	code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: []string{"-check"}})
	if err != nil || code != 1 || !strings.Contains(out, o.says) || !strings.Contains(out, "fix: "+o.fix) || !strings.Contains(page, o.fix) {
		t.Errorf("-check ends with %d %v: %s", code, err, out)
	}
}

// TestOtherBackEnd: without NET_RAW, which the chart gives nft no more than it needs, the legacy back end's rules cannot be read;
// that they are there is said. With it the rule itself is named.
func TestOtherBackEnd(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	p := labtest.Pod(t, n, lab.PodSpec{ServiceAccount: "cart"})
	if _, err := n.Run(ctx, "iptables-legacy", "-t", "nat", "-A", "PREROUTING", "-d", "169.254.169.254/32", "-p", "tcp", "--dport", "80",
		"-j", "DNAT", "--to-destination", n.IP.String()+":8181"); err != nil {
		t.Fatal(err)
	}
	bare := lab.DaemonOptions{Wrap: []string{"setpriv", "--bounding-set", "-net_raw"}}
	d := labtest.Launch(t, n, bare)
	if err := d.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	o := others["other back end"]
	page, err := d.Debug(ctx, "/")
	if err != nil || !strings.Contains(html.UnescapeString(page), o.says) || !strings.Contains(html.UnescapeString(page), o.fix) {
		t.Errorf("the page: %v %s", err, html.UnescapeString(page))
	}
	for _, args := range [][]string{{"-check"}, {"-check", p.Namespace + "/" + p.Name}} {
		run := bare
		run.Flags = args
		if _, out, err := n.RunDaemon(ctx, run); err != nil || !strings.Contains(out, o.says) || !strings.Contains(out, "fix: "+o.fix) {
			t.Errorf("%v: %v %s", args, err, out)
		}
	}
	code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: []string{"-check"}})
	if err != nil || code != 1 || !strings.Contains(out, "a foreign rule (legacy) takes the endpoint: ") {
		t.Errorf("with NET_RAW -check ends with %d %v: %s", code, err, out)
	}
}

// TestNoRegion: what keeps imdsgate from starting is said by the log and by -check.
func TestNoRegion(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	if _, err := n.Run(ctx, "ip", "route", "add", "unreachable", "169.254.169.254"); err != nil {
		t.Fatal(err)
	}
	o := lab.DaemonOptions{Bare: true, Flags: []string{"-node", n.Name, "-host-ip", n.IP.String(), "-kubeconfig", n.Kubeconfig()}}
	for _, more := range [][]string{nil, {"-check"}} {
		run := o
		run.Flags = append(slices.Clone(o.Flags), more...)
		code, out, err := n.RunDaemon(ctx, run)
		if err != nil || code != 1 || !strings.Contains(out, others["no region"].says) {
			t.Errorf("%v ends with %d %v: %s", more, code, err, out)
		}
	}
}

// TestNodesName: a daemon that serves the pods of no node says so.
func TestNodesName(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	flags := []string{"-node", "ip-10-0-0-1"}
	d := labtest.Daemon(t, n, flags...)
	says := others["node's name"].says
	pageThatSays(ctx, t, d, says)
	code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: append(flags, "-check")})
	if err != nil || code != 1 || !strings.Contains(out, says) {
		t.Errorf("-check ends with %d %v: %s", code, err, out)
	}
	if _, err := d.Log().Wait(ctx, says); err != nil {
		t.Error(err)
	}
}

// TestOtherNode: -check says where a pod is that is not here.
func TestOtherNode(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	here, there := labtest.Node(t, shared, lab.NodeOptions{}), labtest.Node(t, shared, lab.NodeOptions{})
	p := labtest.Pod(t, there, lab.PodSpec{})
	code, out, err := here.RunDaemon(ctx, lab.DaemonOptions{Flags: []string{"-check", p.Namespace + "/" + p.Name}})
	if err != nil || code != 1 || !strings.Contains(out, "is bound to node "+there.Name) || !strings.Contains(out, others["other node"].says) {
		t.Errorf("-check ends with %d %v: %s", code, err, out)
	}
}
