package e2e_test

import (
	"context"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"

	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// A daemon that cannot start on a node without rules says what to change, and has closed the endpoint to pods all the same.
func TestLabCannotStart(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		prepare func(t *testing.T, n *lab.Node) lab.DaemonOptions
		says    []string // all of them in one line of the log
		stays   bool     // it goes on trying; otherwise it ends with an exit code other than 0
		open    bool     // nothing could be installed: the endpoint stays as it was
	}{
		"no node": {
			prepare: func(_ *testing.T, n *lab.Node) lab.DaemonOptions {
				return lab.DaemonOptions{Bare: true, Env: []string{"HOST_IP=" + n.IP.String()}, Flags: []string{"-kubeconfig", n.Kubeconfig()}}
			},
			says: []string{"-node", "NODE_NAME"},
		},
		"unknown node": {
			prepare: func(_ *testing.T, n *lab.Node) lab.DaemonOptions {
				return lab.DaemonOptions{Flags: []string{"-node", "nobody"}}
			},
			says: []string{"nobody", "-node", "NODE_NAME"}, stays: true,
		},
		"foreign host IP": {
			prepare: func(_ *testing.T, n *lab.Node) lab.DaemonOptions {
				return lab.DaemonOptions{Flags: []string{"-host-ip", "172.30.9.9"}}
			},
			says: []string{"172.30.9.9", "-host-ip", "HOST_IP"},
		},
		"kubeconfig missing": {
			prepare: func(_ *testing.T, n *lab.Node) lab.DaemonOptions {
				return lab.DaemonOptions{Flags: []string{"-kubeconfig", filepath.Join(n.Dir(), "nothing")}}
			},
			says: []string{"nothing", "kubeconfig"},
		},
		"kubeconfig broken": {
			prepare: func(t *testing.T, n *lab.Node) lab.DaemonOptions {
				return lab.DaemonOptions{Flags: []string{"-kubeconfig", write(t, n, "broken", "not: [a, kubeconfig")}}
			},
			says: []string{"broken", "kubeconfig"},
		},
		"token refused": {
			prepare: func(t *testing.T, n *lab.Node) lab.DaemonOptions {
				data, err := os.ReadFile(n.Kubeconfig())
				if err != nil {
					t.Fatal(err)
				}
				before, _, _ := strings.Cut(string(data), "token: ")
				return lab.DaemonOptions{Flags: []string{"-kubeconfig", write(t, n, "refused", before+"token: nobodys\n")}}
			},
			says: []string{"Unauthorized"}, stays: true,
		},
		"API server unreachable": {
			prepare: func(t *testing.T, n *lab.Node) lab.DaemonOptions {
				data, err := os.ReadFile(n.Kubeconfig())
				if err != nil {
					t.Fatal(err)
				}
				return lab.DaemonOptions{Flags: []string{"-kubeconfig", write(t, n, "elsewhere", strings.ReplaceAll(string(data), ":6443", ":6444"))}}
			},
			says: []string{":6444", "connection refused"}, stays: true,
		},
		"ports taken": {
			prepare: func(t *testing.T, n *lab.Node) lab.DaemonOptions {
				for _, port := range []uint16{8254, 8255} {
					ln, err := n.Net.Listen(t.Context(), "tcp", netip.AddrPortFrom(n.IP, port).String())
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { ln.Close() })
				}
				return lab.DaemonOptions{}
			},
			says: []string{"8254", "8255", "-port"},
		},
		"no iptables": {
			prepare: func(*testing.T, *lab.Node) lab.DaemonOptions {
				return lab.DaemonOptions{Wrap: []string{"/usr/bin/env", "PATH=/nonexistent"}}
			},
			says: []string{"iptables", "install"},
		},
		"no NET_ADMIN": {
			prepare: func(*testing.T, *lab.Node) lab.DaemonOptions {
				return lab.DaemonOptions{Wrap: []string{"setpriv", "--bounding-set", "-net_admin", "--"}}
			},
			says: []string{"NET_ADMIN"}, open: true,
		},
		"state directory of another user": {
			prepare: func(t *testing.T, n *lab.Node) lab.DaemonOptions {
				dir := filepath.Join(n.Dir(), "foreign")
				if err := os.Mkdir(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.Chown(dir, 1000, 1000); err != nil {
					t.Fatal(err)
				}
				return lab.DaemonOptions{Flags: []string{"-state-dir", dir}}
			},
			says: []string{"foreign", "-state-dir"},
		},
		"state directory open to all": {
			prepare: func(t *testing.T, n *lab.Node) lab.DaemonOptions {
				dir := filepath.Join(n.Dir(), "open")
				if err := os.Mkdir(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(dir, 0o777); err != nil {
					t.Fatal(err)
				}
				return lab.DaemonOptions{Flags: []string{"-state-dir", dir}}
			},
			says: []string{"open", "-state-dir"},
		},
		"state directory read-only": {
			prepare: func(*testing.T, *lab.Node) lab.DaemonOptions {
				return lab.DaemonOptions{Flags: []string{"-state-dir", "/proc/imdsgate"}}
			},
			says: []string{"/proc/imdsgate", "-state-dir"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			n := labtest.Node(t, shared, lab.NodeOptions{})
			d := labtest.Launch(t, n, c.prepare(t, n))
			if c.stays {
				if _, err := waitLog(ctx, d, c.says...); err != nil {
					t.Error(err)
				}
				labtest.Eventually(t, func() error { // it has just been started
					_, err := d.Ops(ctx, "/healthz")
					return err
				})
				if _, err := d.Ops(ctx, "/readyz"); err == nil || !strings.Contains(err.Error(), "503") {
					t.Errorf("/readyz says %v, want 503", err)
				}
			} else {
				ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
				defer cancel()
				if code, err := d.WaitExit(ctx); err != nil || code == 0 {
					t.Fatalf("it ended with %d %v, want an error", code, err)
				}
				if _, err := waitLog(ctx, d, c.says...); err != nil {
					t.Error(err)
				}
			}
			if c.open {
				return
			}
			p := labtest.Pod(t, n, lab.PodSpec{})
			if err := attack(ctx, p); err != nil {
				t.Error(err)
			}
			labtest.Untouched(t, n, imds.Expected{NodeRole: true})
		})
	}
}

// Without one of its permissions the daemon says which one, and refuses rather than guesses.
func TestLabMissingPermissions(t *testing.T) {
	t.Parallel()
	without := func(resource string, verbs []string) []rbacv1.PolicyRule {
		var rules []rbacv1.PolicyRule
		for _, r := range lab.Permissions {
			for _, res := range r.Resources {
				left := slices.Clone(r.Verbs)
				if res == resource {
					left = slices.DeleteFunc(left, func(v string) bool { return slices.Contains(verbs, v) })
				}
				if len(left) > 0 {
					rules = append(rules, rbacv1.PolicyRule{APIGroups: r.APIGroups, Resources: []string{res}, Verbs: left})
				}
			}
		}
		return rules
	}
	all, watch, create := []string{"get", "list", "watch"}, []string{"watch"}, []string{"create"}
	for _, c := range []struct {
		resource      string
		verbs         []string
		ready, served bool // what works without
	}{
		{resource: "pods", verbs: all}, {resource: "serviceaccounts", verbs: all}, {resource: "namespaces", verbs: all},
		// What can be listed is known, if not kept up to date.
		{resource: "pods", verbs: watch, served: true}, {resource: "serviceaccounts", verbs: watch, served: true},
		{resource: "namespaces", verbs: watch, served: true},
		{resource: "serviceaccounts/token", verbs: create, ready: true}, {resource: "events", verbs: create, ready: true, served: true},
	} {
		t.Run(strings.Join(c.verbs, " ")+" "+strings.ReplaceAll(c.resource, "/", " "), func(t *testing.T) {
			t.Parallel()
			ctx := labtest.Context(t)
			n := labtest.Node(t, shared, lab.NodeOptions{})
			if err := n.SetPermissions(ctx, without(c.resource, c.verbs)); err != nil {
				t.Fatal(err)
			}
			shop := shared.Unique("shop")
			role := serviceAccount(t, n, shop, "cart", "cart")
			if err := shared.ServiceAccount(ctx, shop, "oops", map[string]string{roleAnnotation: "arn:oops"}); err != nil {
				t.Fatal(err)
			}
			p := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
			oops := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "oops"})
			d := labtest.Launch(t, n, lab.DaemonOptions{Flags: []string{"-issuer", "web-identity"}})
			if c.ready {
				if err := d.WaitReady(ctx); err != nil {
					t.Fatal(err)
				}
			}
			if c.resource == "events" {
				get(t, oops, roleList) // now there is something to report
			}
			if _, err := waitLog(ctx, d, "permission", c.verbs[len(c.verbs)-1], c.resource); err != nil {
				t.Error(err)
			}
			if err := attack(ctx, p); err != nil {
				t.Error(err)
			}
			labtest.Untouched(t, n, imds.Expected{})
			if !c.served {
				if status, body, err := ask(ctx, p, http.MethodGet, endpoint+roleList, nil); err == nil && status == http.StatusOK {
					t.Errorf("without the permission the answer is %d: %s", status, body)
				}
			}

			// Given the permission, it goes on by itself; what was refused is tried again with back-off.
			if err := n.SetPermissions(ctx, lab.Permissions); err != nil {
				t.Fatal(err)
			}
			if err := d.WaitReady(ctx); err != nil {
				t.Fatal(err)
			}
			labtest.Eventually(t, func() error {
				_, doc, err := credentials(ctx, p)
				if err == nil {
					err = owned(n, doc, role)
				}
				return err
			})
		})
	}
}

// waitLog waits for a line of the log that holds all texts.
func waitLog(ctx context.Context, d *lab.Daemon, texts ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return d.Log().Wait(ctx, texts...)
}

// write makes a file on the node and returns its path.
func write(t *testing.T, n *lab.Node, name, content string) string {
	t.Helper()
	path := filepath.Join(n.Dir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
