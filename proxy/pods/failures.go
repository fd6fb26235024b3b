package pods

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// failures are the watches that do not work at present.
type failures struct {
	mu     sync.Mutex
	now    map[*following]error
	logged map[string]time.Time // by verb, resource and reason: a few
}

// following is one watch of the API server, with its lists.
type following struct {
	resource string
	what     string // for people
	over     bool   // guarded by failures.mu

	attempt sync.Mutex // held while a list, or a watch's opening, is under way
}

func newFollowing(resource, namespace, selector string) *following {
	what := resource + " with " + selector
	if namespace != "" {
		what += " in namespace " + namespace
	}
	return &following{resource: resource, what: what}
}

// logEvery is how often one kind of failure is logged: a full node has hundreds of watches, and all of them fail at once.
const logEvery = time.Minute

// note keeps err and reports whether to log it. A list that is cancelled may end after its watch: it is not heard.
func (f *failures) note(w *following, verb string, err error) bool {
	kind := verb + " " + w.resource + " " + string(apierrors.ReasonForError(err))
	f.mu.Lock()
	defer f.mu.Unlock()
	if w.over {
		return false
	}
	f.now[w] = err
	if t, ok := f.logged[kind]; ok && time.Since(t) < logEvery {
		return false
	}
	f.logged[kind] = time.Now()
	return true
}

// clear forgets the failure of w and reports whether it was the last one.
func (f *failures) clear(w *following) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.now[w] == nil {
		return false
	}
	delete(f.now, w)
	return len(f.now) == 0
}

func (f *failures) end(w *following) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w.over = true
	delete(f.now, w)
}

func (f *failures) failing(w *following) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now[w] != nil
}

// err joins the first few.
func (f *failures) err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	sorted := slices.SortedFunc(maps.Keys(f.now), func(a, b *following) int { return strings.Compare(a.what, b.what) })
	var errs []error
	for i, w := range sorted {
		if i == 3 {
			errs = append(errs, fmt.Errorf("and %d more", len(sorted)-i))
			break
		}
		errs = append(errs, f.now[w])
	}
	return errors.Join(errs...)
}
