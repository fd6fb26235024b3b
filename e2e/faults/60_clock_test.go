package faults

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// The wall clock belongs to the whole machine, other people's programs included, and no namespace has one of its own. So the
// daemon is built with a Go runtime whose time.now adds an offset, which it reads from a file; everything else in it is the same.
// The offset jumps while it runs, as the clock of a node does when somebody sets it. The monotonic clock goes on.
const (
	// In place of timeasm.go. realNow is what the assembly's time.now is renamed to.
	shiftedRuntime = `//go:build !faketime

package runtime

import (
	"internal/runtime/atomic"
	_ "unsafe"
)

var clockOffset atomic.Int64 // seconds

func realNow() (sec int64, nsec int32, mono int64)

//go:linkname time_now time.now
func time_now() (sec int64, nsec int32, mono int64) {
	sec, nsec, mono = realNow()
	return sec + clockOffset.Load(), nsec, mono
}

//go:linkname setClockOffset
func setClockOffset(s int64) { clockOffset.Store(s) }
`
	// A further file of cmd/imdsgate.
	shiftedMain = `package main

import (
	"fmt"
	"os"
	"strings"
	"time"
	_ "unsafe"
)

//go:linkname setClockOffset runtime.setClockOffset
func setClockOffset(s int64)

func init() {
	go func() {
		for ; ; time.Sleep(50 * time.Millisecond) {
			b, _ := os.ReadFile("/clock/offset")
			var s int64
			if _, err := fmt.Sscan(strings.TrimSpace(string(b)), &s); err == nil {
				setClockOffset(s)
			}
		}
	}()
}
`
)

// buildShifted builds that daemon into dir.
func (f *fault) buildShifted(dir string) {
	f.Helper()
	if runtime.GOARCH != "amd64" {
		f.Fatalf("the clock can be shifted on amd64 only: time.now is written in assembly there, and this is %s", runtime.GOARCH)
	}
	out, err := exec.CommandContext(f.ctx, "go", "env", "GOROOT").Output()
	f.must(err)
	src, work := filepath.Join(strings.TrimSpace(string(out)), "src", "runtime"), f.TempDir()
	top, err := filepath.Abs("../..")
	f.must(err)
	assembly, err := os.ReadFile(filepath.Join(src, "time_linux_amd64.s"))
	f.must(err)
	const text = "TEXT time·now<ABIInternal>("
	if strings.Count(string(assembly), text) != 1 {
		f.Fatalf("this Go has another time.now: see %s/time_linux_amd64.s", src)
	}
	replace := map[string]string{}
	for file, content := range map[string]string{
		filepath.Join(src, "time_linux_amd64.s"):                strings.Replace(string(assembly), text, "TEXT ·realNow<ABIInternal>(", 1),
		filepath.Join(src, "timeasm.go"):                        shiftedRuntime,
		filepath.Join(top, "cmd", "imdsgate", "clockoffset.go"): shiftedMain,
	} {
		name := filepath.Join(work, filepath.Base(file))
		f.must(os.WriteFile(name, []byte(content), 0o600))
		replace[file] = name
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	f.must(err)
	f.must(os.WriteFile(filepath.Join(work, "overlay.json"), overlay, 0o600))
	f.must(f.Build(f.ctx, filepath.Join(dir, "imdsgate"), top, "-overlay="+filepath.Join(work, "overlay.json"), "-ldflags=-s -w -checklinkname=0", "./cmd/imdsgate"))
}

// The daemon's clock jumps. Nobody loses credentials that are still valid by its clock, and new pods get some or are told 503.
func TestFaultClock(t *testing.T) {
	shared.needs(t, true)
	dirs := []string{}
	for node := 1; node <= 2; node++ {
		dirs = append(dirs, filepath.Join(shared.Node(node).VarLib(), "clock"))
	}
	set := func(f *fault, seconds int) {
		for _, dir := range dirs {
			temp := filepath.Join(dir, "new")
			f.must(os.WriteFile(temp, fmt.Appendln(nil, seconds), 0o600))
			f.must(os.Rename(temp, filepath.Join(dir, "offset")))
		}
	}
	installed := false
	for _, c := range []struct {
		name    string
		seconds int
	}{{"clock 2 h ahead", 7200}, {"clock 2 h behind", -7200}} {
		t.Run(c.name, func(t *testing.T) {
			f := shared.fault(t, c.name, 15*time.Minute, both)
			if !installed {
				for _, dir := range dirs {
					f.must(os.MkdirAll(dir, 0o755))
				}
				set(f, 0)
				f.buildShifted(dirs[0])
				b, err := os.ReadFile(filepath.Join(dirs[0], "imdsgate"))
				f.must(err)
				f.must(os.WriteFile(filepath.Join(dirs[1], "imdsgate"), b, 0o755))
				shared.reinstall(t, "-f", f.values(
					mount{name: "clock", node: "/var/lib/clock", kind: "Directory", path: "/clock"},
					mount{name: "binary", node: "/var/lib/clock/imdsgate", kind: "File", path: "/imdsgate"}))
				installed = true
				f.quiet()
			}
			set(f, c.seconds)
			f.struck()
			f.lasts(5 * time.Second)
			for _, node := range both {
				f.cold = append(f.cold, f.newPod(node))
			}
			f.lasts(40*time.Second - time.Since(f.at))
			told := map[string]int{}
			for _, l := range f.cold {
				for _, r := range f.results(l) {
					told[answer(r)]++
				}
			}
			f.note("new pods saw meanwhile %v", told)
			set(f, 0)
			f.over()
			for _, l := range f.cold {
				f.wholeAt(f.served(l, f.since))
			}
			f.done(expect{
				why:   "by the daemon's clock the credentials have expired",
				kinds: map[bool][]string{true: {"503"}}[c.seconds > 0], whole: 70 * time.Second,
			})
		})
	}
	t.Cleanup(func() {
		if installed {
			shared.reinstall(t)
		}
	})
}
