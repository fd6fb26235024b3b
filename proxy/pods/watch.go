package pods

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	kcache "k8s.io/client-go/tools/cache"
)

// store is what a reflector fills: no second copy of the objects, no queue, no event lost (a relist replaces everything).
// O is the API's type, F what is kept of it.
type store[O runtime.Object, F any] struct {
	decode   func(O) F
	changed  func(F)
	removed  func(F)
	replaced func([]F)
	alive    func() // the watch has delivered everything up to now; may be nil
}

func (s *store[O, F]) facts(o any) (F, error) {
	switch o := o.(type) {
	case F:
		return o, nil
	case O:
		return s.decode(o), nil
	}
	var none F
	return none, fmt.Errorf("unexpected object %T", o)
}

// Transformer lets a watch-list drop what is not kept, object by object.
func (s *store[O, F]) Transformer() kcache.TransformFunc {
	return func(o any) (any, error) { return s.facts(o) }
}

func (s *store[O, F]) Add(o any) error {
	f, err := s.facts(o)
	if err == nil {
		s.changed(f)
	}
	return err
}

func (s *store[O, F]) Update(o any) error { return s.Add(o) }

func (s *store[O, F]) Delete(o any) error {
	if tombstone, ok := o.(kcache.DeletedFinalStateUnknown); ok {
		o = tombstone.Obj
	}
	f, err := s.facts(o)
	if err == nil {
		s.removed(f)
	}
	return err
}

func (s *store[O, F]) Replace(list []any, _ string) error {
	all := make([]F, 0, len(list))
	for _, o := range list {
		f, err := s.facts(o)
		if err != nil {
			return err
		}
		all = append(all, f)
	}
	s.replaced(all)
	return nil
}

func (s *store[O, F]) Resync() error { return nil }

func (s *store[O, F]) Bookmark(string) error {
	if s.alive != nil {
		s.alive()
	}
	return nil
}

// reflect keeps the node's pods in the store until ctx is done. What client-go does about lost connections, bookmarks and
// expired resource versions is client-go's; its log lines would be written past ours and name no permission, so they are
// dropped and errors are logged here. A list may be answered from the past: before 1.31, API servers read all pods of the
// cluster to answer exactly.
func (p *Pods) reflect(ctx context.Context, w *following, into kcache.ReflectorStore, opened func()) {
	selector := p.nodeSelector().String()
	lw := kcache.NewFilteredListWatchFromClient(p.client, w.resource, metav1.NamespaceAll, func(o *metav1.ListOptions) {
		o.FieldSelector = selector
	})
	list, open := lw.ListWithContextFunc, lw.WatchFuncWithContext
	lw.ListWithContextFunc = func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
		w.attempt.Lock()
		defer w.attempt.Unlock()
		attempt, cancel := context.WithTimeout(ctx, p.listTimeout)
		defer cancel()
		l, err := list(attempt, o)
		p.followed(ctx, w, "list", err)
		return l, err
	}
	calm := calm{pauses: p.pauses}
	lw.WatchFuncWithContext = func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
		if err := calm.wait(ctx); err != nil {
			return nil, err
		}
		w.attempt.Lock()
		defer w.attempt.Unlock()
		seconds, atMost := p.watchTime()
		o.TimeoutSeconds = &seconds
		stream, err := openWithin(ctx, p.openTimeout, atMost, func(ctx context.Context) (watch.Interface, error) { return open(ctx, o) })
		if err == nil {
			opened()
		}
		p.followed(ctx, w, "watch", err)
		if err != nil && o.SendInitialEvents != nil {
			// After errors that it knows, the reflector would sleep for up to a minute here without looking at its context.
			// After others it lists, which fails alike, and then waits for either.
			return nil, errors.New(err.Error())
		}
		return stream, err
	}
	discard := logr.Discard()
	kcache.NewReflectorWithOptions(lw, &corev1.Pod{}, into, kcache.ReflectorOptions{Name: w.resource, Logger: &discard, Backoff: p.backoff}).
		RunWithContext(logr.NewContext(ctx, discard))
}

// calm waits before a watch when several before it ended at once. After some errors, such as an event 410, client-go opens the next
// one without a pause, however often: 6,000 a second were counted.
type calm struct {
	pauses func() *wait.Backoff
	pause  *wait.Backoff
	early  int       // watches in a row that followed another one within a second
	last   time.Time // was opened
}

func (c *calm) wait(ctx context.Context) error {
	const usual = 2 // a watch that has expired, and then one that an old API server does not know
	if time.Since(c.last) > time.Second {
		c.early, c.pause = 0, c.pauses()
	} else if c.early++; c.early > usual {
		select {
		case <-time.After(c.pause.Step()):
		case <-ctx.Done():
		}
	}
	c.last = time.Now()
	return ctx.Err()
}

// openWithin opens a watch in time or not at all, because while the API server does not answer, nothing else is tried; and ends it
// when it is overdue.
func openWithin(ctx context.Context, limit, atMost time.Duration, open func(context.Context) (watch.Interface, error)) (watch.Interface, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(limit, func() { cancel(noAnswer(limit)) })
	stream, err := open(ctx)
	inTime := timer.Stop()
	if err == nil && inTime {
		timer.Reset(atMost)
		return ending{stream, func() { timer.Stop(); cancel(nil) }}, nil
	}
	cancel(nil)
	if err == nil {
		stream.Stop()
	}
	if !inTime {
		err = context.Cause(ctx)
	}
	return nil, err
}

// noAnswer is why an attempt ends that the API server leaves without one: client-go would say "context canceled".
func noAnswer(limit time.Duration) error {
	return fmt.Errorf("the API server does not answer within %v", limit)
}

// ending is a watch that ends its context.
type ending struct {
	watch.Interface
	end func()
}

func (e ending) Stop() {
	e.Interface.Stop()
	e.end()
}

// followed notes how a list or the opening of a watch went.
func (p *Pods) followed(ctx context.Context, w *following, verb string, err error) {
	switch {
	case ctx.Err() != nil:
		return
	case err == nil:
		if p.failures.clear(w) {
			p.log.Info("following the API server again", "node", p.node)
		}
		return
	case errors.Is(err, io.EOF), apierrors.IsResourceExpired(err), apierrors.IsGone(err),
		verb == "watch" && (apierrors.IsInvalid(err) || apierrors.IsBadRequest(err)): // an API server without watch-list
		return // a list follows
	}
	err = explainForbidden(err, verb, w.resource)
	if p.failures.note(w, verb, fmt.Errorf("%s %s: %w", verb, w.what, err)) {
		p.log.Error("cannot follow objects of the API server, will try again", "verb", verb, "resource", w.resource, "which", w.what, "error", err)
	}
}

// contact is what is known about how far behind the pods watch may be.
type contact struct {
	last   time.Time // it had delivered everything up to then
	opened time.Time // the present watch
	before time.Time // contact.last when it was opened
}

// catchUp is how long after its opening a watch may still be delivering what happened before.
const catchUp = 5 * time.Second

// firstSeen is a time, by this node's clock, before which no pod can have existed that a watch tells of now for the first
// time. Zero if there is none.
func (c *contact) firstSeen(now time.Time) time.Time {
	seen := now
	if now.Sub(c.opened) < catchUp {
		seen = c.before
	}
	if seen.IsZero() {
		return seen
	}
	return seen.Add(-catchUp)
}

// hurryEvery is how often, at most, a request for an unknown IP ends the pause between two attempts to reach the API server. After
// an outage the pause is up to a minute, and the kubelet, which starts a new pod, has its own: the pod would be refused meanwhile.
const hurryEvery = 5 * time.Second

// hurry returns when a request waits for an IP that nobody has and the pods cannot be followed, or with ctx. It lets the attempt under
// way end first: of an API server that needs longer to answer than hurryEvery, nothing would ever be heard.
func (p *Pods) hurry(ctx context.Context, w *following) {
	for {
		select {
		case <-p.asked:
		case <-ctx.Done():
			return
		}
		w.attempt.Lock()
		due := p.failures.failing(w) && p.hurries.Allow()
		w.attempt.Unlock()
		if due {
			return
		}
	}
}

func (p *Pods) followPods(ctx context.Context) {
	w := newFollowing("pods", "", p.nodeSelector().String())
	defer p.failures.end(w)
	into, opened := p.podStore()
	for ctx.Err() == nil {
		attempts, again := context.WithCancel(ctx)
		var hurry sync.WaitGroup
		hurry.Go(func() {
			defer again()
			p.hurry(attempts, w)
		})
		p.reflect(attempts, w, into, opened)
		again()
		hurry.Wait()
	}
}

// podStore is what the pods are kept in, and what to call when a watch of them was opened.
func (p *Pods) podStore() (into *store[*corev1.Pod, facts], opened func()) {
	into = &store[*corev1.Pod, facts]{
		decode: podFacts,
		changed: func(f facts) {
			now := time.Now().Round(0)
			p.update(func(c *change) {
				p.upsert(c, f, now, p.contact.firstSeen(now))
				p.contact.last = now
			})
		},
		removed: func(f facts) {
			now := time.Now().Round(0)
			p.update(func(c *change) {
				p.remove(c, p.pods[f.pod.UID])
				p.contact.last = now
			})
		},
		replaced: func(list []facts) {
			now := time.Now().Round(0)
			p.update(func(c *change) { p.replace(c, list, now) })
		},
		alive: func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.contact.last = time.Now().Round(0)
		},
	}
	return into, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.contact.opened, p.contact.before = time.Now().Round(0), p.contact.last
	}
}

func (p *Pods) followAccount(ctx context.Context, u *used) {
	follow(ctx, p, "serviceaccounts", u, &corev1.ServiceAccountList{}, accountFacts)
}

func (p *Pods) followNamespace(ctx context.Context, u *used) {
	follow(ctx, p, "namespaces", u, &corev1.NamespaceList{}, namespaceFacts)
}
