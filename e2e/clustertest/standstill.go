package clustertest

import (
	"context"
	"sync"
	"time"
)

// Standstills are the times in which the machine ran nothing of ours, as the hypervisor of a shared one lets happen: a clock that
// should tick all the time did not. What timed out then says nothing of the product. It is safe for concurrent use.
type Standstills struct {
	mu    sync.Mutex
	spans [][2]time.Time
}

const (
	tick       = 20 * time.Millisecond
	standstill = 250 * time.Millisecond // a process that waits for its turn among others ticks more often
)

// Watch notes them until ctx is done.
func (s *Standstills) Watch(ctx context.Context) {
	clock := time.NewTicker(tick)
	defer clock.Stop()
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-clock.C:
		}
		now := time.Now()
		s.ticked(last, now)
		last = now
	}
}

func (s *Standstills) ticked(last, now time.Time) {
	if now.Sub(last) < standstill {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.spans = append(s.spans, [2]time.Time{last, now})
}

// Within is how much of the time from one moment to another they take.
func (s *Standstills) Within(from, to time.Time) (sum time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, span := range s.spans {
		begin, end := span[0], span[1]
		if begin.Before(from) {
			begin = from
		}
		if end.After(to) {
			end = to
		}
		sum += max(0, end.Sub(begin))
	}
	return sum
}
