package scenarios

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// Forty pods one after another, on both nodes in turn, whose first instruction asks for credentials once, with a second for each
// request as boto3: all get their own.
func TestScenarioFirstInstruction(t *testing.T) {
	s := beginScenario(t, 4*time.Minute)
	s.install()
	const ns, pods = "first", 40
	role := s.role("first/app")
	s.newNamespace(ns, allowed(role))
	s.serviceAccount(ns, "app", role)
	var took []time.Duration
	served := 0
	for i := range pods {
		r := s.once(podSpec{namespace: ns, name: fmt.Sprint("p", i), account: "app", node: 1 + i%2})
		s.holds(r, role)
		if r.Kind == sequence.OK {
			served++
		}
		took = append(took, r.Took)
	}
	slices.Sort(took)
	s.figures("%d of %d first instructions served; a sequence took %s at the median, %s at most", served, pods,
		round(took[pods/2]), round(took[pods-1]))
}

func round(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }
