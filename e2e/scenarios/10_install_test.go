package scenarios

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// The two founding scenarios, on each node, with the defaults of either issuer: `aws s3 ls` and `aws iam list-groups` work in a
// pod whose service account names a role, and find no credentials in one whose service account names none.
func TestScenarioInstall(t *testing.T) {
	s := beginScenario(t, 3*time.Minute)
	for _, issuer := range []string{"assume-role", "web-identity"} {
		notes := s.install(fmt.Sprintf("flags.issuer=%q", issuer))
		if !strings.Contains(notes, "helm uninstall leaves the nodes closed") {
			t.Errorf("the notes do not say what helm uninstall leaves:\n%s", notes)
		}
		ns := "install-" + issuer
		role := s.role(ns + "/cart")
		annotations := allowed(role)
		if issuer == "web-identity" {
			annotations = nil // the role's own trust policy decides
		}
		s.newNamespace(ns, annotations)
		s.serviceAccount(ns, "cart", role)
		s.serviceAccount(ns, "visitor", "")
		const both = "aws s3 ls; echo exit=$?; aws iam list-groups --output text; echo exit=$?"
		for node := 1; node <= 2; node++ {
			for _, account := range []string{"cart", "visitor"} {
				s.create(podSpec{namespace: ns, name: fmt.Sprint(account, node), account: account, node: node,
					image: "test.local/aws:1", args: []string{"sh", "-c", "(" + both + ") 2>&1"}})
			}
		}
		if issuer == "web-identity" {
			// In force: not even the daemon may make a token that is not bound to a pod.
			out, err := s.tryKubectl("-n", ns, "create", "token", "cart", "--audience=sts.amazonaws.com",
				"--as=system:serviceaccount:"+namespace+":"+release)
			if err == nil || !strings.Contains(err.Error(), "bound to a pod") {
				t.Errorf("a token without a pod is not refused: %v %.20s", err, out)
			}
		}
		for node := 1; node <= 2; node++ {
			for _, account := range []string{"cart", "visitor"} {
				name := fmt.Sprint(account, node)
				s.waitPod(ns, name, func(p *corev1.Pod) bool { return ended(p) })
				out := s.kubectl("-n", ns, "logs", name)
				t.Logf("%s/%s: %s", ns, name, out)
				want := []string{"ledger", "pictures", "admins", "auditors", "exit=0"}
				if account == "visitor" {
					want = []string{"Unable to locate credentials"}
				}
				for _, w := range want {
					if !strings.Contains(out, w) {
						t.Errorf("%s/%s: %q is not in what the AWS CLI says:\n%s", ns, name, w, out)
					}
				}
				if account == "visitor" && strings.Contains(out, "exit=0") {
					t.Errorf("a pod without a role is served:\n%s", out)
				}
			}
		}
	}
	s.figures("aws s3 ls and aws iam list-groups as they should be in 8 pods on 2 nodes, with assume-role and with web-identity")
}
