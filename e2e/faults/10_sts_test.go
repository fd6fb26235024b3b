package faults

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/clustertest"
	"github.com/imdsgate/imdsgate/e2e/scenarios/sequence"
)

var both = []int{1, 2}

// STS fails in every way. Who has credentials keeps them; who is new is told 503 until STS is well, and never anything else.
func TestFaultSTS(t *testing.T) {
	lasts := 12 * time.Second
	if shared.long {
		lasts = 15 * time.Second
	}
	for _, c := range []struct {
		name  string
		fault aws.Fault
	}{
		{"STS slow", aws.Fault{Delay: 10 * time.Second}}, {"STS throttles", aws.Throttled()}, {"STS 5xx", aws.Unavailable()}, {"STS dead", aws.Fault{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			name, fault := c.name, c.fault
			f := shared.fault(t, name, 3*time.Minute, both, lasts)
			heal := f.Fabric.StartAWS
			if name == "STS dead" {
				f.must(f.Fabric.KillAWS(f.ctx))
			} else {
				fault.Operation = "AssumeRole"
				remove, err := f.Fabric.Inject(f.ctx, fault)
				f.must(err)
				heal = remove
			}
			healed := false
			t.Cleanup(func() {
				if !healed {
					f.must(heal(context.WithoutCancel(f.ctx)))
				}
			})
			f.struck()
			f.cold = []*clustertest.Steady{f.newPod(1), f.newPod(2)}
			f.lasts(lasts - time.Since(f.at))
			refused := 0
			for _, l := range f.cold {
				for _, r := range f.results(l) {
					if r.Kind == sequence.OK {
						t.Errorf("the new pod %s has credentials while STS fails", l.Name)
					}
					refused++
				}
			}
			if refused == 0 {
				t.Error("the new pods have not asked while the fault lasted")
			}
			healed = true
			f.must(heal(f.ctx))
			f.over()
			for _, l := range f.cold {
				f.wholeAt(f.served(l, f.since))
			}
			f.note("new pods were told 503 %d times, and served %.1f s after its end", refused, f.whole.Sub(f.since).Seconds())
			// The daemon's back-off doubles up to a minute, ±10 %, and a call may take its 10 s.
			f.done(expect{whole: min(2*lasts, 66*time.Second) + 10*time.Second})
		})
	}
}

// STS is dead for three quarters of a session's length, and then for longer than it: credentials are served until a minute
// before they expire, then pods are told 503.
func TestFaultSTSDeadForLong(t *testing.T) {
	shared.needs(t, true)
	const session, outage = 5 * time.Minute, 225 * time.Second // 1 h and 45 min, twelve times faster; the last minute is no faster
	f := shared.fault(t, "STS dead for 45 minutes", 10*time.Minute, both)
	f.must(f.Fabric.SetSessionLength(f.ctx, session))
	t.Cleanup(func() { f.must(f.Fabric.SetSessionLength(context.WithoutCancel(f.ctx), 0)) })
	brief := []*clustertest.Steady{f.newPod(1), f.newPod(2)}
	for _, l := range brief {
		f.served(l, time.Time{})
		f.from[l] = len(f.results(l))
	}
	f.warm = append(f.warm, brief...)
	calls, err := f.Fabric.Calls(f.ctx, 0)
	f.must(err)
	f.must(f.Fabric.KillAWS(f.ctx))
	dead := true
	t.Cleanup(func() {
		if dead {
			f.must(f.Fabric.StartAWS(context.WithoutCancel(f.ctx)))
		}
	})
	f.struck()
	f.lasts(outage)
	f.over()
	// For AWS the outage is not over: the second row's goes on. Nothing was asked for, so nothing need be waited for.
	f.note("sessions of 5 min were served all the time; none could be refreshed at half life")
	f.done(expect{whole: time.Second})

	g := shared.fault(t, "STS dead for longer than a session", 10*time.Minute, both)
	g.cold = brief
	for _, l := range brief {
		g.from[l] = len(g.results(l))
	}
	g.at, g.since = f.at, f.at
	for _, l := range brief {
		g.wait("the credentials of "+l.Name+" end", func() error {
			results := g.results(l)
			if last := results[len(results)-1]; answer(last) != "503" {
				return fmt.Errorf("it is answered %s", last.Brief())
			}
			return nil
		})
	}
	ended := time.Now()
	g.lasts(20 * time.Second)
	g.must(g.Fabric.StartAWS(g.ctx))
	dead = false
	g.over()
	for _, l := range brief {
		g.wholeAt(g.served(l, g.since))
	}
	g.note("pods of those sessions were told 503 from %.0f s after the outage began, a minute before the end of their credentials", ended.Sub(g.at).Seconds())
	g.done(expect{whole: 76 * time.Second})
	after, err := g.Fabric.Calls(g.ctx, len(calls))
	g.must(err)
	g.Logf("%d calls to STS since", len(after))
}
