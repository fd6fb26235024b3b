package deploy_test

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// Every right of the chart is needed: without it the daemon names it. An API server that streams lists (watch-list) needs no
// list of service accounts and namespaces; those before do, so list and watch of these go together here.
func TestEveryRightIsNeeded(t *testing.T) {
	_, all := template(t, releaseNamespace, "--set", "flags.issuer=web-identity", "--set", "startupTaint="+taint)
	rules := get[rbacv1.ClusterRole](t, all, "ClusterRole").Rules
	type right struct{ resource, verbs string }
	var rights []right
	for _, r := range rules {
		for _, resource := range r.Resources {
			if resource == "serviceaccounts" || resource == "namespaces" {
				rights = append(rights, right{resource, "list,watch"})
				continue
			}
			for _, verb := range r.Verbs {
				rights = append(rights, right{resource, verb})
			}
		}
	}
	if len(rights) != 9 {
		t.Fatalf("rights: %v", rights)
	}
	for _, missing := range rights {
		verbs := strings.Split(missing.verbs, ",")
		t.Run(missing.resource+" "+missing.verbs, func(t *testing.T) {
			t.Parallel()
			var left []rbacv1.PolicyRule
			for _, r := range rules {
				for _, resource := range r.Resources {
					kept := slices.DeleteFunc(slices.Clone(r.Verbs), func(v string) bool { return resource == missing.resource && slices.Contains(verbs, v) })
					if len(kept) > 0 {
						left = append(left, rbacv1.PolicyRule{APIGroups: r.APIGroups, Resources: []string{resource}, Verbs: kept})
					}
				}
			}
			ctx := labtest.Context(t)
			n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true})
			if err := n.SetPermissions(ctx, left); err != nil {
				t.Fatal(err)
			}
			patch, _ := json.Marshal(map[string]any{"spec": map[string]any{"taints": []corev1.Taint{{Key: taint, Effect: corev1.TaintEffectNoSchedule}}}})
			if _, err := shared.Kube.CoreV1().Nodes().Patch(ctx, n.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
				t.Fatal(err)
			}
			shop := shared.Unique("shop")
			role, err := n.Role("team/rights", aws.ActionListBuckets)
			if err != nil {
				t.Fatal(err)
			}
			for name, arn := range map[string]string{"cart": role, "wrong": "no ARN"} {
				if err := shared.ServiceAccount(ctx, shop, name, map[string]string{"eks.amazonaws.com/role-arn": arn}); err != nil {
					t.Fatal(err)
				}
			}
			labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
			wrong := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "wrong"})

			d := labtest.Launch(t, n, lab.DaemonOptions{Flags: []string{"-issuer", "web-identity", "-startup-taint", taint}})
			// Its refusals become an Event, and count it up.
			asking, stop := context.WithCancel(ctx)
			defer stop()
			go func() {
				tick := time.NewTicker(200 * time.Millisecond)
				defer tick.Stop()
				for ; asking.Err() == nil; <-tick.C {
					if resp, err := wrong.HTTP().Get("http://169.254.169.254/latest/meta-data/iam/security-credentials/"); err == nil {
						resp.Body.Close()
					}
				}
			}()
			verb := verbs[len(verbs)-1]
			if _, err := d.Log().Wait(ctx, "the permission to "+verb+" "+missing.resource+" is missing, see the ClusterRole of the chart"); err != nil {
				t.Errorf("%v:\n%s", err, d.Log().Tail(20))
			}
		})
	}
}

// Every capability of the chart is needed, for its back end: without it the daemon ends, or says what is missing, by name.
func TestEveryCapabilityIsNeeded(t *testing.T) {
	links := t.TempDir()
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
		if err := os.Symlink("/usr/sbin/xtables-legacy-multi", filepath.Join(links, name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct{ caps, path, want string }{
		"NET_ADMIN":           {"-all", "", "NET_ADMIN"},
		"NET_RAW with legacy": {"-all,+net_admin", "PATH=" + links + ":/usr/sbin:/usr/bin:/sbin:/bin", "NET_RAW"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true})
			o := lab.DaemonOptions{Wrap: []string{"setpriv", "--bounding-set=" + c.caps, "--inh-caps=" + c.caps, "--no-new-privs"}}
			if c.path != "" {
				o.Env = []string{c.path}
			}
			d := labtest.Launch(t, n, o)
			if _, err := d.Log().Wait(labtest.Context(t), c.want); err != nil {
				t.Errorf("%v:\n%s", err, d.Log().Tail(20))
			}
		})
	}
}
