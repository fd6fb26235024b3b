package pods

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// failures are the watches that do not work at present. The number is bounded by that of the watches.
type failures struct {
	mu     sync.Mutex
	now    map[string]error
	logged map[string]time.Time // by verb, resource and reason: a few
}

// logEvery is how often one kind of failure is logged: a full node has hundreds of watches, and all of them fail at once.
const logEvery = time.Minute

// note keeps err and reports whether to log it.
func (f *failures) note(what, kind string, err error) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now[what] = err
	if t, ok := f.logged[kind]; ok && time.Since(t) < logEvery {
		return false
	}
	f.logged[kind] = time.Now()
	return true
}

// clear forgets what and reports whether it was the last failure.
func (f *failures) clear(what string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.now[what] == nil {
		return false
	}
	delete(f.now, what)
	return len(f.now) == 0
}

// err joins the first few.
func (f *failures) err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for i, what := range slices.Sorted(maps.Keys(f.now)) {
		if i == 3 {
			errs = append(errs, fmt.Errorf("and %d more", len(f.now)-i))
			break
		}
		errs = append(errs, f.now[what])
	}
	return errors.Join(errs...)
}
