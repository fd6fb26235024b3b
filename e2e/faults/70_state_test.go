package faults

import (
	"fmt"
	"testing"
	"time"
)

const stateDir = "/run/imdsgate"

// The state directory holds noise when the daemon starts: it makes everything anew. Session tokens of before count no more, which
// a client takes for their end.
func TestFaultState(t *testing.T) {
	for _, c := range []struct{ name, spoil string }{
		{"state corrupted", `head -c $(stat -c %s "$f") /dev/urandom >"$f"`},
		{"state truncated", `: >"$f"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := shared.fault(t, c.name, 2*time.Minute, []int{1})
			pid := f.daemon(1)
			f.strikes(1, fmt.Sprintf(`find %s -type f | while read -r f; do %s; done; kill -9 %d`, stateDir, c.spoil, pid))
			f.quiet()
			f.restarted(1, pid)
			f.done(expect{why: notRunning + ", or the tokens of before its start count no more", kinds: append([]string{"401"}, daemonOff...), whole: 15 * time.Second})
			f.must(f.rollout(f.ctx))
		})
	}
}

// smallState puts the state directory of node 1 on a tmpfs of a few blocks, which the daemon finds at its start, and returns how to
// go back.
func (f *fault) smallState() {
	f.Helper()
	f.onNode(1, fmt.Sprintf(`cp -a %[1]s /run/kept; mount -t tmpfs -o size=64k,mode=0700 tmpfs %[1]s; cp -a /run/kept/. %[1]s; rm -rf /run/kept`, stateDir))
	f.must(f.rollout(f.ctx))
	f.Cleanup(func() {
		if said := f.onNodeNow(1, "umount -l "+stateDir); said != "" {
			f.Error(said)
		}
		f.must(f.rollout(f.ctx))
	})
	f.quiet()
}

const fill = `dd if=/dev/zero of=` + stateDir + `/full bs=4k 2>/dev/null; `

// No byte is left in the state directory. Nothing is kept for a restart; everybody is served.
func TestFaultDiskFull(t *testing.T) {
	f := shared.fault(t, "disk full", 3*time.Minute, []int{1})
	f.smallState()
	f.strikes(1, fill+"true")
	l := f.newPod(1)
	f.cold = append(f.cold, l)
	f.served(l, time.Time{})
	f.note("a new pod was served meanwhile")
	f.lasts(5 * time.Second)
	f.over()
	f.onNode(1, "rm "+stateDir+"/full")
	f.done(expect{whole: time.Second})
}

func TestFaultDiskFullDaemonKilled(t *testing.T) {
	f := shared.fault(t, "disk full, daemon killed", 3*time.Minute, []int{1})
	f.smallState()
	pid := f.daemon(1)
	f.strikes(1, fmt.Sprintf("%s kill -9 %d", fill, pid))
	f.quiet()
	f.restarted(1, pid)
	f.done(expect{why: notRunning, kinds: daemonOff, whole: 15 * time.Second})
	f.onNode(1, "rm "+stateDir+"/full")
}

func TestFaultStateReadOnly(t *testing.T) {
	f := shared.fault(t, "state directory read-only", 3*time.Minute, []int{1})
	f.smallState()
	f.strikes(1, "mount -o remount,ro "+stateDir)
	l := f.newPod(1)
	f.cold = append(f.cold, l)
	f.served(l, time.Time{})
	f.note("a new pod was served meanwhile")
	f.lasts(5 * time.Second)
	f.over()
	f.onNode(1, "mount -o remount,rw "+stateDir)
	f.done(expect{whole: time.Second})
}

// A daemon that cannot write its state cannot tell who keeps the rules. It does not start, says why, and pods are refused.
func TestFaultStateReadOnlyDaemonKilled(t *testing.T) {
	f := shared.fault(t, "state directory read-only, daemon killed", 4*time.Minute, []int{1})
	f.smallState()
	pid := f.daemon(1)
	f.strikes(1, fmt.Sprintf("mount -o remount,ro %s; kill -9 %d", stateDir, pid))
	f.lasts(20*time.Second - time.Since(f.at))
	f.over()
	f.onNode(1, "mount -o remount,rw "+stateDir)
	f.quiet()
	f.restarted(1, pid)
	// Kubelet waits twice as long before each further start: 10 s, 20 s, 40 s.
	f.done(expect{why: notRunning, kinds: daemonOff, whole: 50 * time.Second})
}
