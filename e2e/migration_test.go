package e2e_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// A node goes over to imdsgate, and back, while the old daemon runs on it with its rule: no pod and no annotation changes. The
// annotations are those of the old daemons' own documentation.
func TestLabFromOldDaemon(t *testing.T) {
	const base = "arn:aws:iam::" + lab.Account + ":role/"
	for name, c := range map[string]struct {
		namespace, pod map[string]string
		flags          []string
		rule           []string // after the address: which interfaces
		role           string
		spellings      []string // that its clients may ask for
	}{
		"kube2iam": {
			pod:   map[string]string{"iam.amazonaws.com/role": base + "team/reader"},
			flags: []string{"-pod-annotations", "-namespace-policy", "off"},
			rule:  []string{"-i", "+"}, role: "team/reader",
			spellings: []string{"reader", "team/reader", base + "team/reader"},
		},
		"kube2iam --namespace-restrictions --base-role-arn": {
			namespace: map[string]string{"iam.amazonaws.com/allowed-roles": `["my-custom-path/*", "reader"]`},
			pod:       map[string]string{"iam.amazonaws.com/role": "my-custom-path/reader", "iam.amazonaws.com/external-id": "shop-1"},
			flags:     []string{"-pod-annotations", "-base-role-arn", base},
			rule:      []string{"-i", "+"}, role: "my-custom-path/reader",
			spellings: []string{"reader", "my-custom-path/reader"},
		},
		"kiam": {
			namespace: map[string]string{"iam.amazonaws.com/permitted": ".*"},
			pod:       map[string]string{"iam.amazonaws.com/role": "reportingdb-reader", "iam.amazonaws.com/session-name": "my-session-name"},
			flags:     []string{"-pod-annotations", "-base-role-arn", base},
			rule:      []string{"!", "-i", "eth0"}, role: "reportingdb-reader",
			spellings: []string{"reportingdb-reader", base + "reportingdb-reader"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true})
			trust := aws.Trust{AWS: lab.NodeRoleARN, ExternalID: c.pod["iam.amazonaws.com/external-id"]}
			if err := n.AWS.SetRole(aws.Role{ARN: base + c.role, Trust: []aws.Trust{trust}, Allow: []string{aws.ActionListBuckets}}); err != nil {
				t.Fatal(err)
			}
			shop := shared.Unique("shop")
			if err := shared.Namespace(ctx, shop, c.namespace); err != nil {
				t.Fatal(err)
			}
			p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, Annotations: c.pod})
			old := oldDaemon(t, n, c.rule)
			before, err := n.Run(ctx, "iptables-save")
			if err != nil {
				t.Fatal(err)
			}
			if status, body := get(t, p, roleList); status != http.StatusOK || body != old {
				t.Fatalf("without imdsgate: %d %s", status, body)
			}

			d := labtest.Daemon(t, n, c.flags...)
			p.HTTP().CloseIdleConnections()
			served(t, n, p, base+c.role) // beside the old daemon
			for _, spelling := range c.spellings {
				if err := wantStatus(p, roleList+spelling, http.StatusOK); err != nil {
					t.Error(err)
				}
			}
			if code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: append([]string{"-check"}, c.flags...)}); err != nil || code != 1 || !strings.Contains(out, "8181") {
				t.Errorf("-check says nothing of the old daemon's rule: %d %v\n%s", code, err, out)
			}

			if err := d.Stop(ctx); err != nil {
				t.Fatal(err)
			}
			if code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: []string{"-cleanup"}}); err != nil || code != 0 {
				t.Fatalf("-cleanup: %d %v\n%s", code, err, out)
			}
			p.HTTP().CloseIdleConnections()
			if status, body := get(t, p, roleList); status != http.StatusOK || body != old {
				t.Errorf("back with the old daemon: %d %s", status, body)
			}
			if after, err := n.Run(ctx, "iptables-save"); err != nil || rulesOf(after) != rulesOf(before) {
				t.Errorf("iptables-save before and after: %v\n%s\n%s", err, before, after)
			}
		})
	}
}

// oldDaemon listens where kube2iam and kiam do and installs their rule. It answers everything with the text that it returns.
func oldDaemon(t *testing.T, n *lab.Node, interfaces []string) string {
	t.Helper()
	const text = "the-old-daemon"
	ctx := labtest.Context(t)
	at := netip.AddrPortFrom(n.IP, 8181).String()
	var ln net.Listener
	err := n.Net.Do(func() (err error) { ln, err = net.Listen("tcp", at); return err })
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, text) })}
	go func() { _ = s.Serve(ln) }()
	t.Cleanup(func() { s.Close() })
	rule := append([]string{"-t", "nat", "-A", "PREROUTING", "-p", "tcp", "-d", "169.254.169.254", "--dport", "80", "-j", "DNAT", "--to-destination", at}, interfaces...)
	if out, err := n.Run(ctx, "iptables", rule...); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return text
}

// rulesOf are the rules of iptables-save. That the kernel now has an empty table filter, as on every node with kube-proxy, is no rule.
func rulesOf(save string) string {
	var rules []string
	for line := range strings.SplitSeq(save, "\n") {
		if strings.HasPrefix(line, "-A ") {
			rules = append(rules, line)
		}
	}
	return fmt.Sprint(rules)
}
