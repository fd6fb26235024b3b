package faults

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

// daemon is the process of the daemon on a node.
func (f *fault) daemon(node int) (pid int) {
	f.Helper()
	f.wait(fmt.Sprintf("one daemon on node %d", node), func() (err error) {
		if pid, err = f.Node(node).Daemon(f.ctx); err == nil && pid == 0 {
			err = fmt.Errorf("there is none, or more than one")
		}
		return err
	})
	return pid
}

// restarted waits until the node has another daemon than before, which is ready, and returns how it says the first ended.
func (f *fault) restarted(node, before int) {
	f.Helper()
	f.wait("another daemon", func() error {
		pid, err := f.Node(node).Daemon(f.ctx)
		if err == nil && (pid == 0 || pid == before) {
			err = fmt.Errorf("there is none")
		}
		return err
	})
	f.must(f.Rollout(f.ctx))
}

const notRunning = "the daemon does not run"

// SIGKILL.
func TestFaultDaemonKilled(t *testing.T) {
	f := shared.fault(t, "daemon killed", 2*time.Minute, []int{1})
	pid, before := f.daemon(1), f.rulesOf(1, "iptables")
	calls, err := f.Fabric.Calls(f.ctx, 0)
	f.must(err)
	f.strikes(1, fmt.Sprintf("kill -9 %d", pid))
	if now := f.rulesOf(1, "iptables"); now != before {
		t.Errorf("the rules have gone with the daemon: before\n%s\nnow\n%s", before, now)
	}
	f.quiet()
	f.restarted(1, pid)
	f.done(expect{why: notRunning, kinds: daemonOff, whole: 10 * time.Second})
	f.noCalls(len(calls))
	f.must(f.rollout(f.ctx))
}

// noCalls fails if STS was asked since.
func (f *fault) noCalls(since int) {
	f.Helper()
	calls, err := f.Fabric.Calls(f.ctx, since)
	f.must(err)
	if len(calls) > 0 {
		f.Errorf("the restart costs %d calls to STS, such as %+v", len(calls), calls[0])
	}
}

// SIGSTOP for less than the liveness probe needs: the kernel goes on accepting connections, and nothing is lost but time.
func TestFaultDaemonStopped(t *testing.T) {
	f := shared.fault(t, "daemon stopped for 30 s", 2*time.Minute, []int{1})
	pid := f.daemon(1)
	f.strikes(1, fmt.Sprintf("kill -STOP %d", pid))
	f.lasts(30*time.Second - time.Since(f.at))
	f.over()
	f.onNode(1, fmt.Sprintf("kill -CONT %d", pid))
	f.done(expect{why: notRunning, kinds: daemonOff, whole: 5 * time.Second})
	if now := f.daemon(1); now != pid {
		t.Errorf("the daemon is another one")
	}
}

// SIGSTOP for good: the kubelet's liveness probe finds it.
func TestFaultDaemonHangs(t *testing.T) {
	f := shared.fault(t, "daemon hangs", 4*time.Minute, []int{1})
	pid := f.daemon(1)
	f.strikes(1, fmt.Sprintf("kill -STOP %d", pid))
	f.restarted(1, pid)
	f.done(expect{why: notRunning, kinds: daemonOff, whole: 125 * time.Second})
	f.must(f.rollout(f.ctx))
}

// The kernel's OOM killer ends it.
func TestFaultDaemonOutOfMemory(t *testing.T) {
	f := shared.fault(t, "daemon out of memory", 2*time.Minute, []int{1})
	pid := f.daemon(1)
	kills := f.oomKills()
	// 8 MiB less than what the daemon has, so it is the largest that the kernel finds.
	f.strikes(1, fmt.Sprintf(`
g=/sys/fs/cgroup/memory$(awk -F: '$2=="memory"{print $3}' /proc/%d/cgroup)
echo 0 >$g/memory.force_empty 2>/dev/null
echo $(($(cat $g/memory.usage_in_bytes) + 1048576)) >$g/memory.limit_in_bytes
(sh -c 'echo $$ >'$g'/cgroup.procs; head -c 8m /dev/zero | tail -n 1 >/dev/null') 2>/dev/null; true`, pid))
	f.restarted(1, pid)
	f.quiet()
	if n := f.oomKills() - kills; n == 0 {
		t.Error("the kernel has killed nothing")
	} else {
		f.note("the kernel ended %d processes", n)
	}
	p, err := f.daemonPod(f.ctx, 1)
	f.must(err)
	if end := p.Status.ContainerStatuses[0].LastTerminationState.Terminated; end == nil || end.ExitCode != 137 {
		t.Errorf("the daemon ended as %+v", end)
	}
	f.done(expect{why: notRunning, kinds: daemonOff, whole: 15 * time.Second})
	f.must(f.rollout(f.ctx))
}

func (f *fault) oomKills() int {
	f.Helper()
	n, err := strconv.Atoi(strings.TrimPrefix(f.onNode(1, "grep '^oom_kill ' /proc/vmstat"), "oom_kill "))
	f.must(err)
	return n
}
