package scenarios

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// The daemon of each node is killed with SIGKILL under load. Redirect and guard stay, the kubelet brings it back, and what fails in
// between is refused or told 503; nothing is answered wrong.
func TestScenarioKill(t *testing.T) {
	s := beginScenario(t, 3*time.Minute)
	s.install()
	const ns = "kill"
	roles := []string{s.role("kill/app0"), s.role("kill/app1")}
	s.newNamespace(ns, allowed(roles...))
	for i, role := range roles {
		name := fmt.Sprint("p", i)
		s.serviceAccount(ns, name, role)
		s.create(podSpec{namespace: ns, name: name, account: name, node: 1 + i, args: []string{"idle"}})
	}
	var loads []*load
	for i, role := range roles {
		name := fmt.Sprint("p", i)
		s.waitPod(ns, name, running)
		s.holds(s.ask(ns, name), role)
		loads = append(loads, s.load(ns, name, role, 2, 20*time.Millisecond))
	}
	calls, err := s.fabric.Calls(s.ctx, 0)
	s.must(err)
	var killed time.Time
	var gone [3]time.Time // by node
	for node := 1; node <= 2; node++ {
		before := s.daemon(node)
		if node == 1 {
			killed = time.Now()
		}
		s.onNode(node, "kill", "-9", fmt.Sprint(before))
		s.onNode(node, "sh", "-c", fmt.Sprintf("while kill -0 %d 2>/dev/null; do sleep 0.01; done", before))
		gone[node] = time.Now()
		dead := s.onNode(node, "sh", "-c", "iptables-save -t nat; ip -4 rule; pgrep -xa imdsgate || true")
		for _, rule := range []string{"169.254.169.254/32 -p tcp -m tcp --dport 80 -j DNAT", "to 169.254.169.254 unreachable"} {
			if !strings.Contains(dead, rule) {
				t.Errorf("node %d: after the kill there is no %q in\n%s", node, rule, dead)
			}
		}
	}
	back := time.Duration(0)
	for i, role := range roles {
		s.askUntil(ns, fmt.Sprint("p", i), "back", func(r sequence.Result) bool { return r.Kind == sequence.OK })
		back = max(back, time.Since(killed))
		s.holds(s.ask(ns, fmt.Sprint("p", i)), role)
	}
	s.rolledOut()
	kinds, total := map[string]int{}, 0
	var longest time.Duration
	for i, l := range loads {
		sum := l.end()
		total += sum.Sequences
		var first, last time.Time
		for _, f := range sum.Failures {
			if first.IsZero() {
				first = f.At
			}
			last = f.At.Add(f.Took)
			switch {
			case f.Kind == sequence.Refused, f.Kind == sequence.Status && f.Code == 503:
			case f.Kind == sequence.Cut && f.At.Before(gone[1+i]): // under way when the process died
			default:
				t.Errorf("%s: a failure that is neither refused nor 503: %s", l.pod, f.Brief())
			}
		}
		longest = max(longest, last.Sub(first))
		for kind, n := range sum.Kinds {
			kinds[kind] += n
		}
	}
	var text []string
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		text = append(text, fmt.Sprintf("%d %s", kinds[kind], kind))
	}
	after, err := s.fabric.Calls(s.ctx, len(calls))
	s.must(err)
	if len(after) > 0 {
		t.Errorf("the restart costs %d calls to STS, such as %+v", len(after), after[0])
	}
	s.figures("kill -9 of both daemons: served again after %s at most, failures over %s; %s of %d sequences", back.Round(10*time.Millisecond),
		longest.Round(10*time.Millisecond), strings.Join(text, ", "), total)
}
