package pods

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/proxy"
)

// Since is the best bound that is certain: never later than the pod's first token can be, whatever clocks wrote the status.
func TestSince(t *testing.T) {
	now := time.Date(2026, 1, 2, 12, 0, 0, 700e6, time.UTC)
	sec := now.Truncate(time.Second)
	at := func(d time.Duration) *time.Time { t := sec.Add(d); return &t }
	type container struct {
		startedAt  *time.Time
		terminated bool
		restarts   int32
	}
	type status struct {
		start      *time.Time
		init, main []container
		at         time.Duration // when we see it, after now
	}
	for _, tt := range []struct {
		name     string
		seen     time.Time // zero: in the first list
		statuses []status
		want     time.Time
	}{
		{name: "nothing known", statuses: []status{{}}, want: time.Time{}},
		{name: "startTime", statuses: []status{{start: at(-time.Minute)}}, want: sec.Add(-time.Minute)},
		{name: "startTime is floored", statuses: []status{{start: at(-time.Minute + 999e6)}}, want: sec.Add(-time.Minute)},
		{name: "of this very second", statuses: []status{{start: at(0)}}, want: sec},
		{name: "API server 2 h ahead: never locked out", statuses: []status{{start: at(2 * time.Hour)}}, want: time.Time{}},
		{name: "2 h ahead, seen by the watch", seen: now.Add(-catchUp), statuses: []status{{start: at(2 * time.Hour)}}, want: now.Add(-catchUp)},
		{name: "2 h behind, seen by the watch", seen: now.Add(-catchUp), statuses: []status{{start: at(-2 * time.Hour)}}, want: now.Add(-catchUp)},
		{name: "2 h behind, in the list", statuses: []status{{start: at(-2 * time.Hour)}}, want: sec.Add(-2 * time.Hour)},
		{name: "a future time stays wrong when it has come", statuses: []status{
			{start: at(2 * time.Hour)}, {start: at(2 * time.Hour), at: 3 * time.Hour},
		}, want: time.Time{}},
		{name: "long Pending: its first container bounds it", statuses: []status{
			{start: at(-time.Hour), main: []container{{startedAt: at(-time.Minute)}}},
		}, want: sec.Add(-time.Minute - startDelay)},
		{name: "noted as started after it has got a token, in the second before", statuses: []status{
			{start: at(-time.Hour), main: []container{{startedAt: at(0)}}},
		}, want: sec.Add(-startDelay)},
		{name: "the earliest of all, init containers too", statuses: []status{{
			start: at(-time.Hour),
			init:  []container{{startedAt: at(-10 * time.Minute), terminated: true}},
			main:  []container{{startedAt: at(-time.Minute)}, {}},
		}}, want: sec.Add(-10*time.Minute - startDelay)},
		{name: "restarted: nobody knows when it first ran", statuses: []status{
			{start: at(-time.Hour), main: []container{{startedAt: at(-time.Minute), restarts: 1}}},
		}, want: sec.Add(-time.Hour)},
		{name: "one of two restarted", statuses: []status{
			{start: at(-time.Hour), main: []container{{startedAt: at(-time.Minute)}, {startedAt: at(-time.Second), restarts: 3}}},
		}, want: sec.Add(-time.Hour)},
		{name: "ended, nobody knows when it began", statuses: []status{
			{start: at(-time.Hour), init: []container{{terminated: true}}, main: []container{{startedAt: at(-time.Minute)}}},
		}, want: sec.Add(-time.Hour)},
		{name: "container in the future", statuses: []status{
			{start: at(-time.Hour), main: []container{{startedAt: at(2 * time.Hour)}}},
		}, want: sec.Add(-time.Hour)},
		{name: "gets better with what becomes known", statuses: []status{
			{start: at(-time.Hour)}, {start: at(-time.Hour), main: []container{{startedAt: at(time.Minute)}}, at: 2 * time.Minute},
		}, want: sec.Add(time.Minute - startDelay)},
		{name: "and stays when it is forgotten", statuses: []status{
			{start: at(-time.Hour), main: []container{{startedAt: at(-time.Minute)}}},
			{start: at(-time.Hour), main: []container{{startedAt: at(0), restarts: 1}}, at: time.Minute},
		}, want: sec.Add(-time.Minute - startDelay)},
		{name: "later than seen", seen: now.Add(-catchUp), statuses: []status{
			{}, {start: at(0), at: time.Second},
		}, want: sec},
	} {
		h := newHarness(t, newAPIServer(t), testPolicy())
		fill(h.Pods, 0)
		var caller *proxy.Caller
		for _, s := range tt.statuses {
			p := podOf("a", "", []string{"10.0.0.1"})
			if s.start != nil {
				p.Status.StartTime = &metav1.Time{Time: *s.start}
			}
			convert := func(cs []container) (all []corev1.ContainerStatus) {
				for _, c := range cs {
					var started metav1.Time
					if c.startedAt != nil {
						started.Time = *c.startedAt
					}
					state := corev1.ContainerState{}
					switch {
					case c.terminated:
						state.Terminated = &corev1.ContainerStateTerminated{StartedAt: started}
					case c.startedAt != nil:
						state.Running = &corev1.ContainerStateRunning{StartedAt: started}
					}
					all = append(all, corev1.ContainerStatus{RestartCount: c.restarts, State: state})
				}
				return all
			}
			p.Status.InitContainerStatuses, p.Status.ContainerStatuses = convert(s.init), convert(s.main)
			h.update(func(c *change) { h.upsert(c, podFacts(p), now.Add(s.at), tt.seen) })
			before := caller
			caller = mustWait(t, h.Pods, "10.0.0.1")
			if before != nil && caller.Since.Before(before.Since) {
				t.Errorf("%s: Since went back from %s to %s", tt.name, before.Since, caller.Since)
			}
		}
		if !caller.Since.Equal(tt.want) {
			t.Errorf("%s: Since = %s, want %s", tt.name, caller.Since, tt.want)
		}
	}
}

// A pod that the watch tells of late must not be bounded by the moment it is told.
func TestFirstSeen(t *testing.T) {
	now := time.Now()
	for _, tt := range []struct {
		name string
		c    contact
		want time.Time
	}{
		{"the watch has been open", contact{last: now.Add(-time.Second), opened: now.Add(-time.Hour), before: now.Add(-2 * time.Hour)}, now.Add(-catchUp)},
		{"just reopened after an outage", contact{last: now, opened: now.Add(-time.Second), before: now.Add(-time.Hour)}, now.Add(-time.Hour - catchUp)},
		{"just reopened after its timeout", contact{last: now, opened: now.Add(-time.Second), before: now.Add(-2 * time.Second)}, now.Add(-2*time.Second - catchUp)},
		{"the first one, not listed yet", contact{opened: now}, time.Time{}},
	} {
		if got := tt.c.firstSeen(now); !got.Equal(tt.want) {
			t.Errorf("%s: %s, want %s", tt.name, got.Sub(now), tt.want.Sub(now))
		}
	}
}

// The whole way: pods of the first list have no bound but their status; those that the watch tells of do; those that came
// while it was away are bounded by the time before.
func TestFirstSeenByTheWatch(t *testing.T) {
	t.Parallel()
	a := newAPIServer(t)
	a.put(podOf("listed", "", []string{"10.0.0.1"}))
	h := start(t, a, testPolicy()).synced(t)
	if c := mustWait(t, h.Pods, "10.0.0.1"); !c.Since.IsZero() {
		t.Errorf("listed: Since = %s", c.Since)
	}
	before := time.Now()
	a.put(podOf("watched", "", []string{"10.0.0.2"}))
	if c := mustWait(t, h.Pods, "10.0.0.2"); c.Since.After(before.Add(-catchUp)) || c.Since.Before(before.Add(-catchUp-time.Minute)) {
		t.Errorf("watched: Since = %s, seen at %s", c.Since, before)
	}
	last := func() time.Time {
		h.Pods.mu.Lock()
		defer h.Pods.mu.Unlock()
		return h.contact.last
	}
	contact := last()
	a.bookmark("pods")
	poll(t, "the bookmark", func() bool { return last().After(contact) })
	a.set(func() { a.down = true })
	a.disconnect()
	h.until("the watch to end", func() bool { return a.open["pods"] == 0 })
	before = time.Now()
	a.put(podOf("missed", "", []string{"10.0.0.3"}))
	a.compact()
	a.set(func() { a.down = false })
	if c := mustWait(t, h.Pods, "10.0.0.3"); c.Since.After(before.Add(-catchUp)) || c.Since.IsZero() {
		t.Errorf("missed: Since = %s, away since before %s", c.Since, before)
	}
}
