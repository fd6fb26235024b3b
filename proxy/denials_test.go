package proxy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode"
)

// What is remembered is bounded, tells the latest first, and one pod that asks in a loop hides no other.
func TestDenials(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.get(t, "denied", roleList+"/")
	l.get(t, "no-role", roleList+"/")
	for i := range 3 * maxDenials {
		l.get(t, "role", fmt.Sprintf("%s/%d%s", roleList, i, strings.Repeat("%00x\u00e9", 200)))
	}
	all := l.Server.Denials()
	if len(all) != 3 {
		t.Fatalf("%d denials: %+v", len(all), all)
	}
	for i, want := range []Denial{
		{Count: 3 * maxDenials, Reason: reasonOtherRole, Code: 404, Pod: "role"},
		{Count: 1, Reason: reasonNoRole, Code: 404, Pod: "no-role", Path: roleList + "/"},
		{Count: 1, Reason: reasonDenied, Code: 403, Pod: "denied", Path: roleList + "/"},
	} {
		got := all[i]
		if got.Count != want.Count || got.Reason != want.Reason || got.Code != want.Code || got.Pod != want.Pod || want.Path != "" && got.Path != want.Path {
			t.Errorf("denial %d is %+v, want %+v", i, got, want)
		}
		if got.Text == "" || len(got.Path) > 96 || strings.ContainsFunc(got.Path, unicode.IsControl) || got.Last.IsZero() {
			t.Errorf("denial %d is %+v", i, got)
		}
	}

	var d denials
	start := time.Now()
	for i := range 3 * maxDenials {
		d.add(Denial{Last: start.Add(time.Duration(i) * time.Second), Source: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), Reason: "r"})
	}
	if len(d.all) != maxDenials || cap(d.all) > 2*maxDenials {
		t.Errorf("%d are remembered", len(d.all))
	}
	for _, old := range d.all {
		if old.Last.Before(start.Add(2 * maxDenials * time.Second)) {
			t.Errorf("an old one is remembered instead of a new one: %v", old.Last.Sub(start))
		}
	}
}
