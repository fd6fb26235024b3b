package main

import (
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// How much garbage may gather between two collections. What one costs depends on what lives, 2 to 6 MB, a millisecond or two; an
// answer leaves 2.4 KB of garbage, nearly all of it net/http's. In proportion to what lives, as Go has it, an answer would cost 4 %
// more on a nearly empty node. Room is memory, though: at rest there is little, while many pods ask more, for as long as they do.
const (
	roomAtRest = 2 << 20
	roomInUse  = 16 << 20
	inUse      = 4 << 20          // bytes allocated a second: 1,700 answers
	calm       = 15 * time.Second // after which the room is given back
	lookEvery  = time.Second
)

// gcPercentStart is for the start, which leaves much garbage: what lives long then lies close together. It is never less, or a daemon
// with much that lives would do nothing but collect.
const gcPercentStart = 20

// collector sets the room of Go's garbage collector. Its zero value is one that has set nothing.
type collector struct {
	seen    heap
	at      time.Time
	busy    time.Time // when it was last in use
	large   bool      // the room is roomInUse
	percent int
}

// heap is what collector looks at: bytes.
type heap struct{ allocated, live uint64 }

func readHeap() heap {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}}
	metrics.Read(s)
	return heap{s[0].Value.Uint64(), s[1].Value.Uint64()}
}

// look returns the per cent of garbage on top of what lives that are right now, and whether room was taken back.
func (c *collector) look(now time.Time, h heap) (percent int, returned bool) {
	if elapsed := now.Sub(c.at).Seconds(); !c.at.IsZero() && elapsed > 0 && float64(h.allocated-c.seen.allocated)/elapsed > inUse {
		c.busy = now
	}
	c.seen, c.at = h, now
	was := c.large
	c.large = !c.busy.IsZero() && now.Sub(c.busy) < calm
	room := uint64(roomAtRest)
	if c.large {
		room = roomInUse
	}
	// With p per cent, collection begins at the larger of live+p·live and p·4 MiB.
	live := max(h.live, 1<<20)
	return max(gcPercentStart, int(min(100*room/live, 100*(room+live)/(4<<20)))), was && !c.large
}

// follow looks and sets. Setting stops the world for some 20 µs, so it needs a reason.
func (c *collector) follow() {
	percent, returned := c.look(time.Now(), readHeap())
	if 4*max(percent-c.percent, c.percent-percent) > c.percent { // by a quarter
		debug.SetGCPercent(percent)
		c.percent = percent
	}
	if returned {
		debug.FreeOSMemory()
	}
}
