package e2e_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// Before imdsgate is installed, -check -all says which pods of the cluster would get something else than kube2iam and kiam gave them.
func TestLabSurvey(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	const base = "arn:aws:iam::123456789012:role/"
	open, closed, irsa := shared.Unique("open"), shared.Unique("closed"), shared.Unique("irsa")
	for namespace, annotations := range map[string]map[string]string{
		open: {"iam.amazonaws.com/permitted": ".*"}, closed: nil, irsa: {"iam.amazonaws.com/allowed-roles": `["*"]`},
	} {
		if err := shared.Namespace(ctx, namespace, annotations); err != nil {
			t.Fatal(err)
		}
	}
	if err := shared.ServiceAccount(ctx, irsa, "web", map[string]string{roleAnnotation: base + "web"}); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]lab.PodSpec{
		"reports": {Namespace: open, Annotations: map[string]string{"iam.amazonaws.com/role": "reporting/reader"}},
		"plain":   {Namespace: open},
		"host":    {Namespace: open, Annotations: map[string]string{"iam.amazonaws.com/role": "host"}, HostNetwork: true},
		"denied":  {Namespace: closed, Annotations: map[string]string{"iam.amazonaws.com/role": "admin"}},
		"gains":   {Namespace: irsa, ServiceAccount: "web"},
		"differs": {Namespace: irsa, ServiceAccount: "web", Annotations: map[string]string{"iam.amazonaws.com/role": "old"}},
		"has":     {Namespace: irsa, ServiceAccount: "web", Env: map[string]string{"AWS_WEB_IDENTITY_TOKEN_FILE": "/t"}},
	} {
		p.Name, p.Detached, p.IP = name, true, netip.Addr{}
		labtest.Pod(t, n, p)
	}
	for _, c := range []struct {
		flags     []string
		want, not []string
	}{
		{[]string{"-pod-annotations"}, []string{
			open + "/reports (1 pod, service account default)\n  --  annotation    " + base + "reporting/reader\n  ok  imdsgate      " + base + "reporting/reader\n",
			open + "/host (1 pod, service account default)\n  --  annotation    " + base + "host\n  !!  imdsgate      it uses the node's network",
			closed + "/denied (1 pod, service account default)\n  --  annotation    " + base + "admin\n  !!  imdsgate      refused: namespace " + closed,
			"kubectl annotate namespace " + closed,
			irsa + "/gains (1 pod, service account web)\n  ok  imdsgate      " + base + "web\n",
			irsa + "/differs (1 pod, service account web)\n  --  annotation    " + base + "old\n  !!  imdsgate      " + base + "web, by its service account",
			irsa + "/has (1 pod, service account web)\n  --  imdsgate      its containers name another source",
		}, []string{open + "/plain"}},
		{nil, []string{open + "/reports (1 pod, service account default)\n  --  annotation    " + base + "reporting/reader\n  !!  imdsgate      refused: "}, []string{open + "/plain"}},
	} {
		t.Run(fmt.Sprint(c.flags), func(t *testing.T) {
			code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{
				Bare: true, Flags: append([]string{"-check", "-all", "-kubeconfig", n.Kubeconfig(), "-base-role-arn", base}, c.flags...),
			})
			if err != nil || code != 1 {
				t.Errorf("exit code %d, %v; want 1 because pods would change", code, err)
			}
			for _, want := range c.want {
				if !strings.Contains(out, want) {
					t.Errorf("it does not say %q", want)
				}
			}
			for _, not := range c.not {
				if strings.Contains(out, not) {
					t.Errorf("it says %q of a pod that has no role before or after", not)
				}
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}
