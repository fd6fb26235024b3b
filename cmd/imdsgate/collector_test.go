package main

import (
	"testing"
	"time"
)

func TestCollectorRoom(t *testing.T) {
	t.Parallel()
	const mb = 1 << 20
	var c collector
	now := time.Unix(1000, 0)
	allocated := uint64(0)
	for i, tt := range []struct {
		after     time.Duration
		allocates uint64
		live      uint64
		heap      int // at which a collection is to begin
		returned  bool
	}{
		{0, 100 * mb, 2 * mb, 3 * mb, false}, // the start's garbage is nobody's use
		{time.Second, mb / 8, 2 * mb, 3 * mb, false},
		{time.Second, 0, 5 * mb, 6 * mb, false},
		{time.Second, 3 * mb, 2 * mb, 3 * mb, false}, // a scrape
		{time.Second, mb, 2 * mb, 6 * mb, false},
		{time.Second, 9 * mb, 2 * mb, 6 * mb, false},
		{time.Second, 9 * mb, 2 * mb, 34 * mb, false},
		{time.Second, 0, 2 * mb, 34 * mb, false},
		{calm - 3*time.Second, 26 * mb, 4 * mb, 36 * mb, false},
		{time.Second, 2 * mb, 4 * mb, 36 * mb, false},
		{time.Second, 2 * mb, 4 * mb, 12 * mb, true},
		{time.Second, 0, 4 * mb, 12 * mb, false},
		{calm - 2*time.Second, 0, 4 * mb, 12 * mb, false},
		{time.Second, 0, 4 * mb, 5 * mb, true},
		{time.Second, 0, 4 * mb, 5 * mb, false},
	} {
		now, allocated = now.Add(tt.after), allocated+tt.allocates
		percent, returned := c.look(now, heap{allocated, tt.live})
		begins := max(int(tt.live)*(100+percent), 4*mb*percent) / 100 // as the runtime has it
		if begins < tt.heap-mb/10 || begins > tt.heap || returned != tt.returned {
			t.Errorf("step %d: with %d %% a collection begins at %d, returned %v; want %d, %v", i, percent, begins, returned, tt.heap, tt.returned)
		}
	}
	if percent, _ := c.look(now.Add(time.Second), heap{allocated, 0}); percent != 50 { // 2 MiB
		t.Errorf("%d %% before the first collection, want 50", percent)
	}
	if percent, _ := c.look(now.Add(time.Minute), heap{allocated, 500 * mb}); percent != gcPercentStart {
		t.Errorf("%d %% with 500 MiB that live", percent)
	}
	if h := readHeap(); h.allocated == 0 {
		t.Error("the runtime's metrics have other names")
	}
}
