package main

import (
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// How much garbage may gather between two collections. What one costs depends on what lives, 2 to 6 MB, a millisecond or two; an
// answer leaves 2.4 KB of garbage, nearly all of it net/http's. In proportion to what lives, as Go has it, an answer would cost 4 %
// more on a nearly empty node. Room is memory, though: at rest there is little, while many pods ask more, for as long as they do. With
// as many answers as a machine of two cores can give, 16 MiB made each 9 % dearer than 128 MiB did.
const (
	minRoom   = 1 << 20
	maxRoom   = 32 << 20
	between   = 4 * time.Second  // two collections, as far as maxRoom goes
	calm      = 15 * time.Second // after which room is given back
	lookEvery = time.Second
)

// gcPercentStart is for the start, which leaves much garbage: what lives long then lies close together. It is never less, or a daemon
// with much that lives would do nothing but collect.
const gcPercentStart = 20

// collector sets the room of Go's garbage collector. Its zero value is one that has set nothing.
type collector struct {
	seen    heap
	at      time.Time
	wanted  uint64 // room, when it looked last
	room    uint64
	needed  time.Time // when all of the room last was
	percent int
}

// heap is what collector looks at: bytes.
type heap struct{ allocated, live uint64 }

func readHeap() heap {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}}
	metrics.Read(s)
	return heap{s[0].Value.Uint64(), s[1].Value.Uint64()}
}

// look returns the per cent of garbage on top of what lives that are right now, and whether much room was taken back.
func (c *collector) look(now time.Time, h heap) (percent int, returned bool) {
	room := uint64(minRoom)
	if elapsed := now.Sub(c.at).Seconds(); !c.at.IsZero() && elapsed > 0 {
		rate := float64(h.allocated-c.seen.allocated) / elapsed
		room = uint64(min(max(rate*between.Seconds(), minRoom), maxRoom))
	}
	c.seen, c.at = h, now
	c.wanted, room = room, max(minRoom, min(room, c.wanted)) // a second alone is no load: somebody asked for the metrics
	if room >= c.room || now.Sub(c.needed) >= calm {
		returned = room <= c.room/2
		c.room, c.needed = room, now
	}
	// With p per cent, collection begins at the larger of live+p·live and p·4 MiB.
	live := max(h.live, 1<<20)
	return max(gcPercentStart, int(min(100*c.room/live, 100*(c.room+live)/(4<<20)))), returned
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
