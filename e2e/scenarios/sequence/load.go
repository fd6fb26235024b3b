package sequence

import (
	"context"
	"slices"
	"sync"
	"time"
)

// Summary is what a load came to.
type Summary struct {
	Sequences     int
	Kinds         map[string]int
	Keys          map[string]int // sequences by the access key they got
	Failures      []Result       // the first ones
	P50, P99, Max time.Duration
}

// maxFailures is enough to see what is wrong, and when.
const maxFailures = 2000

// Each runs workers that each begin a sequence every interval, until ctx is done and the last has ended, and hands every result
// to emit, one at a time. The requests of every second sequence share a connection.
func Each(ctx context.Context, workers int, interval, limit time.Duration, emit func(Result)) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			tick := time.NewTicker(interval)
			defer tick.Stop()
			for n := 0; ; n++ {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				r := Run(context.WithoutCancel(ctx), limit, n%2 == 0)
				mu.Lock()
				emit(r)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

// Load is Each, summed up.
func Load(ctx context.Context, workers int, interval, limit time.Duration) Summary {
	var took []time.Duration
	s := Summary{Kinds: map[string]int{}, Keys: map[string]int{}}
	Each(ctx, workers, interval, limit, func(r Result) {
		s.Sequences++
		s.Kinds[r.Kind]++
		took = append(took, r.Took)
		if r.Kind == OK {
			s.Keys[r.AccessKeyID]++
		} else if len(s.Failures) < maxFailures {
			s.Failures = append(s.Failures, r)
		}
	})
	if len(took) > 0 {
		slices.Sort(took)
		s.P50, s.P99, s.Max = took[len(took)/2], took[len(took)*99/100], took[len(took)-1]
	}
	return s
}
