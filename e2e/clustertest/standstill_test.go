package clustertest

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestStandstills(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(ms)) }
	var s Standstills
	s.ticked(at(0), at(240)) // others' turn
	s.ticked(at(1000), at(2000))
	s.ticked(at(5000), at(5300))
	for _, c := range []struct{ from, to, want int }{
		{0, 900, 0}, {0, 10_000, 1300}, {1500, 1600, 100}, {900, 1100, 100}, {1900, 5100, 200}, {3000, 2500, 0}, {6000, 9000, 0},
	} {
		if got := s.Within(at(c.from), at(c.to)); got != time.Duration(c.want)*time.Millisecond {
			t.Errorf("from %d to %d: %v, want %d ms", c.from, c.to, got, c.want)
		}
	}
	// A clock that ticks has none.
	synctest.Test(t, func(t *testing.T) {
		var s Standstills
		go s.Watch(t.Context())
		begun := time.Now()
		time.Sleep(time.Minute)
		if got := s.Within(begun, time.Now()); got != 0 {
			t.Errorf("%v of a minute", got)
		}
	})
}
