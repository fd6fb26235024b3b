package scenarios

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

// Update after update under load: every node hands over ten times and more, pods ask in full sequences all the while, each request
// once and with a second for it, and none fails. One update changes what is in the redirect's chains, and one takes it back.
func TestScenarioUpdateUnderLoad(t *testing.T) {
	s := beginScenario(t, 8*time.Minute)
	const both = "updateStrategy.maxSurge=2" // both nodes at once
	s.install(both)
	const ns = "update"
	var loads []*load
	var roles []string
	for i := range 4 {
		roles = append(roles, s.role(fmt.Sprint("update/app", i)))
	}
	s.newNamespace(ns, allowed(roles...))
	for i, role := range roles {
		name := fmt.Sprint("p", i)
		s.serviceAccount(ns, name, role)
		s.create(podSpec{namespace: ns, name: name, account: name, node: 1 + i%2, args: []string{"idle"}})
	}
	for i := range roles {
		name := fmt.Sprint("p", i)
		s.waitPod(ns, name, running)
		s.holds(s.ask(ns, name), roles[i])
	}
	const workers, interval = 4, 120 * time.Millisecond // of each of the four pods
	start := time.Now()
	for i, role := range roles {
		loads = append(loads, s.load(ns, fmt.Sprint("p", i), role, workers, interval))
	}
	handovers := 0
	chains := map[int]string{}
	for node := 1; node <= 2; node++ {
		chains[node] = s.onNode(node, "iptables-save", "-t", "nat")
	}
	update := func(what string, f func()) {
		before := []int{s.daemon(1), s.daemon(2)}
		f()
		for node := 1; node <= 2; node++ {
			if pid := s.daemon(node); pid != before[node-1] {
				handovers++
			} else {
				t.Errorf("%s: node %d still runs the same daemon", what, node)
			}
		}
	}
	update("another interface", func() { s.install(both, `flags.interface="!eth0"`) })
	for node := 1; node <= 2; node++ {
		if now := s.onNode(node, "iptables-save", "-t", "nat"); !strings.Contains(now, "! -i eth0") {
			t.Errorf("node %d: the update has not changed the chain: before\n%s\nnow\n%s", node, chains[node], now)
		}
	}
	update("any interface", func() { s.install(both) })
	for handovers < 20 {
		update("restart", func() {
			s.kubectl("-n", namespace, "rollout", "restart", "daemonset/"+release)
			s.rolledOut()
		})
	}
	// The load goes on until it is large enough: at nine tenths of its rate, or again on a machine that has not kept it up.
	const enough = 10_000
	until := start.Add(enough * interval / (4 * workers) * 10 / 9)
	total, failed := 0, 0
	var p50, p99, longest time.Duration
	for total < enough {
		select {
		case <-s.ctx.Done():
			t.Fatalf("only %d sequences: %v", total, s.ctx.Err())
		case <-time.After(time.Until(until)):
		}
		for _, l := range loads {
			sum := l.end()
			total += sum.Sequences
			failed += sum.Sequences - sum.Kinds[sequence.OK]
			p50, p99, longest = max(p50, sum.P50), max(p99, sum.P99), max(longest, sum.Max)
			for _, f := range sum.Failures[:min(5, len(sum.Failures))] {
				t.Errorf("%s: at %s after %s: %s", l.pod, f.At.Format("15:04:05.000"), f.Took, f.Brief())
			}
		}
		if total < enough {
			for i, l := range loads {
				loads[i] = s.load(ns, l.pod, l.role, workers, interval)
			}
			until = time.Now().Add(time.Duration(enough-total) * interval / (4 * workers) * 10 / 9)
		}
	}
	s.figures("%d of %d sequences failed over %d handovers in %.0f s; p50 %s p99 %s max %s", failed, total, handovers,
		time.Since(start).Seconds(), round(p50), round(p99), round(longest))
	if failed > 0 {
		s.logDaemons()
	}
}

// logDaemons shows what the daemons wrote last.
func (s *scenario) logDaemons() {
	logs, _ := s.tryKubectl("-n", namespace, "logs", "-l", "app.kubernetes.io/name="+release, "--tail=40", "--prefix")
	s.Log(logs)
}
