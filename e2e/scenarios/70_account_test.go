package scenarios

import (
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// What happens to a service account reaches its running pods: the annotation is added, changed and removed, the account is deleted
// and made again. A pod in the host network is the node, as documented.
func TestScenarioServiceAccount(t *testing.T) {
	s := beginScenario(t, 3*time.Minute)
	s.install()
	const ns = "accounts"
	red, green := s.role("accounts/red"), s.role("accounts/green")
	s.newNamespace(ns, allowed(red, green))
	s.serviceAccount(ns, "app", "")
	for node := 1; node <= 2; node++ {
		s.create(podSpec{namespace: ns, name: fmt.Sprint("p", node), account: "app", node: node, args: []string{"idle"}})
	}
	for node := 1; node <= 2; node++ {
		s.waitPod(ns, fmt.Sprint("p", node), running)
	}
	none := func(r sequence.Result) bool { return r.Kind == sequence.Status && r.Code == 404 && r.Step == "list" }
	has := func(role string) func(sequence.Result) bool {
		return func(r sequence.Result) bool {
			return r.Kind == sequence.OK && s.owner(r.AccessKeyID).RoleARN == role
		}
	}
	var longest time.Duration
	until := func(what string, right func(sequence.Result) bool) {
		t.Helper()
		for node := 1; node <= 2; node++ {
			longest = max(longest, s.askUntil(ns, fmt.Sprint("p", node), what, right))
		}
	}
	until("no annotation", none)
	s.annotate(ns, "app", red)
	until("annotation added", has(red))
	s.annotate(ns, "app", green)
	until("annotation changed", has(green))
	s.annotate(ns, "app", "")
	until("annotation removed", none)
	s.annotate(ns, "app", red)
	until("annotation added again", has(red))
	s.must(s.kube.CoreV1().ServiceAccounts(ns).Delete(s.ctx, "app", metav1.DeleteOptions{}))
	until("service account deleted", none)
	s.serviceAccount(ns, "app", green)
	until("service account made again", has(green))

	s.sealed()
	r := s.once(podSpec{namespace: ns, name: "host", account: "app", node: 1, hostNetwork: true})
	s.breach() // by the host network alone
	if r.Kind != sequence.OK || s.owner(r.AccessKeyID).NodeIndex != 1 {
		t.Errorf("a pod in node 1's host network does not get what the node gets: %s", r.Brief())
	}
	s.figures("annotation added, changed, removed, service account deleted and made again: right in running pods of both CNIs %s later at most, the asking included", longest.Round(10*time.Millisecond))
}
