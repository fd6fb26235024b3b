package scenarios

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

// A daemon with nothing to do, on a node that has one pod of its own, needs at most 32 MiB and 0.2 % of a core, the iptables that it
// runs included. Its probes are not counted: they are processes of the kubelet's.
func TestScenarioIdle(t *testing.T) {
	s := beginScenario(t, 3*time.Minute)
	s.install()
	const ns = "idle"
	role := s.role("idle/app")
	s.newNamespace(ns, allowed(role))
	s.serviceAccount(ns, "app", role)
	for node := 1; node <= 2; node++ {
		name := fmt.Sprint("p", node)
		s.create(podSpec{namespace: ns, name: name, account: "app", node: node, args: []string{"idle"}})
		s.waitPod(ns, name, running)
		s.holds(s.ask(ns, name), role)
	}
	// What the start needed is over after a few seconds.
	wait := func(d time.Duration) {
		select {
		case <-s.ctx.Done():
			t.Fatal(s.ctx.Err())
		case <-time.After(d):
		}
	}
	wait(5 * time.Second)
	const over = time.Minute
	pids, before := map[int]int{}, map[int]time.Duration{}
	start := time.Now()
	for node := 1; node <= 2; node++ {
		pids[node] = s.daemon(node)
		before[node] = s.cpu(node, pids[node])
	}
	wait(over)
	for node := 1; node <= 2; node++ {
		share := 100 * float64(s.cpu(node, pids[node])-before[node]) / float64(time.Since(start))
		rss := s.rss(node, pids[node])
		s.figures("node %d: RSS %.1f MiB, CPU %.2f %% of a core over %s", node, rss, share, time.Since(start).Round(time.Second))
		if rss > 32 {
			t.Errorf("node %d: RSS of %.1f MiB", node, rss)
		}
		if share > 0.2 {
			t.Errorf("node %d: CPU of %.2f %% of a core", node, share)
		}
	}
}

// cpu is the processor time that a process of a node and the processes that it ran have used.
func (s *scenario) cpu(node, pid int) time.Duration {
	s.Helper()
	// In nanoseconds; /proc/PID/stat counts in ticks of 10 ms. Of every thread, as threads end with theirs only when the process is gone.
	var sum time.Duration
	for line := range strings.Lines(s.onNode(node, "sh", "-c", fmt.Sprintf("cat /proc/%d/task/*/schedstat", pid))) {
		n, err := strconv.ParseInt(strings.Fields(line)[0], 10, 64)
		s.must(err)
		sum += time.Duration(n)
	}
	stat := s.onNode(node, "cat", fmt.Sprintf("/proc/%d/stat", pid))
	fields := strings.Fields(stat[strings.LastIndex(stat, ")")+1:])
	for _, ticks := range fields[13:15] { // of its children, when they had ended
		n, err := strconv.ParseInt(ticks, 10, 64)
		s.must(err)
		sum += time.Duration(n) * 10 * time.Millisecond
	}
	return sum
}

// rss is a process's resident memory in MiB.
func (s *scenario) rss(node, pid int) float64 {
	s.Helper()
	for line := range strings.Lines(s.onNode(node, "cat", fmt.Sprintf("/proc/%d/status", pid))) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseFloat(strings.Fields(value)[0], 64)
			s.must(err)
			return kb / 1024
		}
	}
	s.Fatalf("process %d has no VmRSS", pid)
	return 0
}
