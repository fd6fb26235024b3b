package cache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// issueTimeout ends one call of the Issuer. It is the cache's own: requests give up after 450 ms, and the answer that
	// they no longer wait for is what the next one is served from.
	issueTimeout = 10 * time.Second
	// defaultRate is the default of -sts-rate.
	defaultRate = 10
	// maxBackground bounds the issues in flight that no request waits for. Those that one waits for are not counted, so
	// that calls that hang cannot starve them.
	maxBackground = 16
	// resync is the longest sleep of Run. Timers follow the monotonic clock only: a jump of the wall clock is seen here.
	resync = 30 * time.Second
)

// Options are the parts of a Cache.
type Options struct {
	Issuer Issuer
	// Live yields every key that the pods of this node are authorized for; keys may repeat. True: issue ahead of the first
	// request. False: issue when a request asks, then keep fresh as long as it is live. Called by Run alone, without locks, after
	// Wake, for keys that are asked for unexpectedly or go, and at least once a minute; the body of the loop over it does not call back.
	Live func() iter.Seq2[Key, bool]
	// Encode is called once per issued credentials; its result is their Document. Nil: no document.
	Encode func(Credentials) []byte
	// Rate is both the issue calls a second and their burst (at least 1). Zero: 10. An issuer that throttles makes it less for a while.
	Rate float64
	// Dir keeps what was issued for the next run, see Restore. Empty: nothing is kept.
	Dir     string
	Log     *slog.Logger          // nil: none
	Metrics prometheus.Registerer // nil: none
}

// Cache has the credentials of keys. Make it with New. It is safe for concurrent use.
type Cache struct {
	issuer  Issuer
	live    func() iter.Seq2[Key, bool]
	encode  func(Credentials) []byte
	log     *slog.Logger
	pace    pace
	shares  shares
	metrics metrics
	wake    chan struct{} // of capacity 1: tells Run to look again at the entries
	stale   atomic.Bool   // and to read the live set before

	mu         sync.RWMutex
	entries    map[Key]*entry
	background int // issues in flight that no request waited for when they began

	// Of an earlier run. A value becomes an entry's when exactly its key is live or asked for, so that every one is authorized
	// afresh; until then nothing serves it.
	restored map[Key]*value
	dir      string
	store    *store         // nil: nothing is kept
	unkept   map[Key]*value // what the store has not been told yet; nil: the key has gone

	// Run's own, kept between passes to save the allocation.
	keys []liveKey
	due  []*entry
}

type liveKey struct {
	key      Key
	prefetch bool
}

// New returns a Cache that does nothing before Run and registers its metrics.
func New(o Options) *Cache {
	limit := o.Rate
	if limit <= 0 {
		limit = defaultRate
	}
	c := &Cache{
		issuer:  o.Issuer,
		live:    o.Live,
		encode:  o.Encode,
		log:     o.Log,
		pace:    newPace(limit),
		shares:  newShares(limit),
		wake:    make(chan struct{}, 1),
		entries: make(map[Key]*entry),
		dir:     o.Dir,
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.metrics = newMetrics(o.Metrics, c)
	return c
}

// Restore reads what an earlier run kept in Options.Dir, so that a restart costs no STS call and survives an STS outage. It is
// called once, before Run; without Dir it does nothing, and without Restore nothing is kept. It makes the directory when it is
// missing and refuses one that others than root and this process may use. Single files that cannot be used are removed, with a
// log line.
func (c *Cache) Restore() error {
	if c.dir == "" {
		return nil
	}
	s, err := openStore(c.dir, func(file string, err error) {
		c.log.Warn("kept credentials dropped", "file", file, "error", err.Error())
	})
	if err != nil {
		return fmt.Errorf("directory of kept credentials: %w", err)
	}
	values, err := s.restore(time.Now(), c.encode)
	if err != nil {
		return fmt.Errorf("read kept credentials: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.store, c.restored, c.unkept = s, values, make(map[Key]*value)
	c.log.Info("credentials of an earlier run", "sessions", len(values))
	return nil
}

// tellStore has the store follow: v is the key's value now, nil: it has gone. The lock is held.
func (c *Cache) tellStore(key Key, v *value) {
	if c.store != nil {
		c.unkept[key] = v
	}
}

// newEntry makes the entry of a key, with the value of an earlier run if there is one: somebody asked for it then, or it was
// prefetched, so it is kept fresh. The lock is held.
func (c *Cache) newEntry(key Key) *entry {
	v := c.restored[key]
	delete(c.restored, key)
	e := &entry{key: key, value: v, asked: v != nil, changed: make(chan struct{})}
	c.entries[key] = e
	return e
}

// Ref remembers where a Cache has what belongs to one key, for Peek. Its zero value is ready for use. It is safe for concurrent use.
type Ref struct{ entry atomic.Pointer[entry] }

// Peek returns the credentials of a key, or nil unless there are some that may be served now, which the caller knows: a clock costs
// as much as the rest. It never blocks on an issue and does not allocate. The key is only read, and only the first time with a ref,
// which must always be used with the same key: to look one up is to read nine strings, mostly from cold memory. Nil: no ref.
func (c *Cache) Peek(key *Key, ref *Ref, now time.Time) *Credentials {
	c.mu.RLock()
	defer c.mu.RUnlock()
	var e *entry
	if ref != nil {
		e = ref.entry.Load()
	}
	if e == nil || e.evicted {
		if e = c.entries[*key]; e == nil {
			return nil
		}
		if ref != nil {
			ref.entry.Store(e)
		}
	}
	if !e.servable(now) {
		return nil
	}
	c.metrics.served(e)
	return &e.value.creds
}

// Get returns the credentials of a key and waits for them until ctx is done. When the next try after a failure lies beyond
// ctx's deadline it returns the remembered error at once. The error is an *IssueError when the issuer was denied, else it
// wraps ErrUnavailable and, if there was one, the last error of the issuer.
func (c *Cache) Get(ctx context.Context, key Key) (*Credentials, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[key]
	if e == nil {
		e = c.newEntry(key)
		c.stale.Store(true) // whether a live pod holds it is not known yet
	}
	if e.servable(time.Now()) {
		c.metrics.served(e)
		return &e.value.creds, nil
	}
	e.asked = true
	if e.hopeless(ctx) { // without a word to Run: a pod that asks in a loop costs nothing
		c.metrics.failed.Inc()
		return nil, e.unavailable()
	}
	if e.waiters == 0 {
		e.waitingSince = time.Now()
	}
	e.waiters++
	signal(c.wake)
	defer func() {
		if e.waiters--; e.waiters == 0 {
			signal(c.wake) // no live pod may hold it
		}
	}()
	for {
		if e.servable(time.Now()) {
			c.metrics.waited.Inc()
			return &e.value.creds, nil
		}
		if ctx.Err() != nil || e.hopeless(ctx) {
			c.metrics.failed.Inc()
			return nil, e.unavailable()
		}
		changed := e.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		}
		c.mu.Lock()
	}
}

// Wake tells Run that the live set changed. It never blocks; calls that come before Run has looked are one.
func (c *Cache) Wake() {
	c.stale.Store(true)
	signal(c.wake)
}

// signal tells the receiver of a channel of capacity 1 to look again. It never blocks.
func signal(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// Retry forgets the errors of a service account's keys, or with an empty serviceAccount of all keys of the namespace, so
// that they are tried again at once: somebody changed what may have been the reason.
func (c *Cache) Retry(namespace, serviceAccount string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, e := range c.entries {
		if key.Namespace == namespace && (serviceAccount == "" || key.ServiceAccount == serviceAccount) {
			e.err, e.failures, e.retryAt = nil, 0, time.Time{}
		}
	}
	signal(c.wake)
}

// Run issues, refreshes and evicts until ctx is done and the calls in flight, which it cancels, have returned. It must run
// once. Its error is always nil.
func (c *Cache) Run(ctx context.Context) error {
	var issues, keeping sync.WaitGroup
	changed := make(chan struct{}, 1)
	keeping.Go(func() { c.keep(ctx, changed) })
	defer func() {
		issues.Wait()
		close(changed)
		keeping.Wait()
	}()
	timer := time.NewTimer(resync)
	defer timer.Stop()
	var read time.Time
	for ctx.Err() == nil {
		// The end of an issue changes nothing about who lives, and on a full node 250 keys are due together: to read all of them
		// after each one, and to hand all values to the store, was 29 % of the CPU time of a refresh.
		fresh := c.stale.Swap(false) || time.Since(read) >= resync
		if fresh {
			read = time.Now()
			c.readLive(read)
		}
		start, sleep := c.next(time.Now(), fresh)
		for _, e := range start {
			issues.Go(func() { c.issue(ctx, e) })
		}
		signal(changed)
		timer.Reset(sleep)
		select {
		case <-ctx.Done():
		case <-c.wake:
		case <-timer.C:
		}
	}
	return nil
}

// readLive marks the entries of live keys.
func (c *Cache) readLive(now time.Time) {
	c.keys = c.keys[:0]
	for key, prefetch := range c.live() {
		c.keys = append(c.keys, liveKey{key, prefetch})
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		e.live, e.prefetch = false, false
	}
	for _, k := range c.keys {
		e := c.entries[k.key]
		if e == nil {
			if !k.prefetch && c.restored[k.key] == nil {
				continue
			}
			e = c.newEntry(k.key)
		}
		e.live, e.prefetch = true, e.prefetch || k.prefetch
	}
	// Nobody may want them, but before the pods are known nobody does. They are few, and none outlives its session.
	for key, v := range c.restored {
		if !v.servable(now) {
			delete(c.restored, key)
		}
	}
}

// next returns the entries to issue now, marked as such, and how long nothing else is to be done unless something changes. It evicts
// what no live pod holds and nobody waits for, if the live set is fresh: a pod may have come for it.
func (c *Cache) next(now time.Time, fresh bool) (start []*entry, sleep time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sleep = resync
	c.due = c.due[:0]
	c.shares.forget(now)
	for key, e := range c.entries {
		switch {
		case e.issuing:
			continue
		case e.waiters == 0 && !e.live:
			if !fresh || c.stale.Load() { // it may be newer than what was read
				c.Wake()
				continue
			}
			delete(c.entries, key)
			if e.value != nil {
				c.tellStore(key, nil)
			}
			e.evicted, e.value = true, nil // who has a Ref keeps no secret
			continue
		case e.waiters == 0 && !e.prefetch && !e.asked:
			continue
		}
		if wait := e.dueAt(now).Sub(now); wait > 0 {
			sleep = min(sleep, wait)
			continue
		}
		e.greedy = c.shares.greedy(e.key.Namespace, now)
		c.due = append(c.due, e)
	}
	slices.SortFunc(c.due, byUrgency)
	c.pace.adjust(now)
	bucket := c.pace.bucket
	for _, e := range c.due {
		background := e.waiters == 0
		if background && c.background == maxBackground {
			continue // the end of one of them wakes Run
		}
		need := 1.0
		if background && bucket.Burst() > 1 {
			need = 2 // the last token is for a request, which then need not wait for the next
		}
		if tokens := bucket.TokensAt(now); tokens < need {
			refill := time.Duration((need - tokens) / float64(bucket.Limit()) * float64(time.Second))
			sleep = min(sleep, refill+time.Millisecond)
			break
		}
		bucket.AllowN(now, 1)
		c.shares.spend(e.key.Namespace, now)
		e.issuing, e.background = true, background
		if background {
			c.background++
		}
		start = append(start, e)
	}
	return start, sleep
}

// issue calls the issuer for an entry that next has marked.
func (c *Cache) issue(ctx context.Context, e *entry) {
	var (
		v   *value
		err error
	)
	defer func() {
		if r := recover(); r != nil {
			// The value may hold anything, and err is shown to pods.
			c.log.ErrorContext(ctx, "issuing panicked", "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
			v, err = nil, errPanic
		}
		c.finish(ctx, e, v, err)
	}()
	err = errNothing // should the issuer end the goroutine
	timeout, cancel := context.WithTimeout(ctx, issueTimeout)
	defer cancel()
	creds, issueErr := c.issuer.Issue(timeout, e.key)
	if err = issueErr; err == nil {
		v, err = newValue(creds, e.key.Duration, 0, time.Now(), c.encode)
	}
}

var (
	errPanic   = errors.New("internal error while issuing credentials; the log of this node's imdsgate tells more")
	errNothing = errors.New("the issuer returned no credentials")
)

// finish publishes the outcome of an issue to its waiters.
func (c *Cache) finish(ctx context.Context, e *entry, v *value, err error) {
	now := time.Now()
	c.mu.Lock()
	e.issuing = false
	if e.background {
		c.background--
	}
	var retryIn time.Duration
	if err == nil {
		e.value, e.err, e.failures, e.retryAt = v, nil, 0, time.Time{}
		c.tellStore(e.key, v)
	} else {
		retryIn = backOff(e.failures, rand.Float64())
		e.err, e.retryAt = err, now.Add(retryIn) // the value stays: invariant 4
		if refused, ok := errors.AsType[*IssueError](err); ok && refused.Throttled {
			c.pace.throttled(now) // it says when to try again, and who goes first then: the key has not failed
		} else {
			e.failures++
		}
	}
	close(e.changed)
	e.changed = make(chan struct{})
	c.mu.Unlock()
	signal(c.wake)

	log := c.log.With("namespace", e.key.Namespace, "service_account", e.key.ServiceAccount,
		"role_arn", e.key.RoleARN, "session_name", e.key.SessionName)
	switch {
	case err == nil:
		log.InfoContext(ctx, "session issued", "access_key_id", v.creds.AccessKeyID,
			"expires", v.creds.Expires.UTC(), "sts_request_id", v.creds.RequestID)
	case ctx.Err() == nil: // else Run ends, which is no failure
		log.WarnContext(ctx, "issuing session failed", "error", err.Error(), "retry_in", retryIn.Round(time.Millisecond).String())
	}
}

// keep makes the directory follow the cache: once after each signal, and once more when the channel is closed. It is a
// goroutine of its own, so that no request and no issue ever waits for a disk. A failure fails nothing: the next run asks STS.
func (c *Cache) keep(ctx context.Context, changed <-chan struct{}) {
	if c.store == nil {
		return
	}
	for open := true; open; {
		_, open = <-changed
		if err := c.store.sync(c.takeUnkept(), time.Now()); err != nil {
			c.log.WarnContext(ctx, "credentials are not kept for a restart: see that the state directory is there and has room",
				"error", err.Error())
		}
	}
}

func (c *Cache) takeUnkept() map[Key]*value {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.unkept) == 0 {
		return nil
	}
	changes := c.unkept
	c.unkept = make(map[Key]*value)
	return changes
}

// State says what an entry can do for a request.
type State string

// The states of an entry: label values of imdsgate_credentials_entries.
const (
	Ready   State = "ready"   // has credentials that may be served
	Pending State = "pending" // has none yet
	Failed  State = "failed"  // has none and the last try failed
)

// Entry tells about one key, without secrets.
type Entry struct {
	Key             Key
	State           State
	Issued, Expires time.Time // of the newest credentials; zero: none yet
	NextIssue       time.Time // not before; zero while one is in flight
	Err             error     // of the last try; nil after success
}

// Snapshot yields every entry as of its call, by namespace, service account and role.
func (c *Cache) Snapshot() iter.Seq[Entry] {
	now := time.Now()
	c.mu.RLock()
	entries := make([]Entry, 0, len(c.entries))
	for _, e := range c.entries {
		s := Entry{Key: e.key, State: e.state(now), Err: e.err}
		if e.value != nil {
			s.Issued, s.Expires = e.value.creds.Issued, e.value.creds.Expires
		}
		if !e.issuing {
			s.NextIssue = e.dueAt(now)
		}
		entries = append(entries, s)
	}
	c.mu.RUnlock()
	slices.SortFunc(entries, func(a, b Entry) int {
		return cmp.Or(strings.Compare(a.Key.Namespace, b.Key.Namespace),
			strings.Compare(a.Key.ServiceAccount, b.Key.ServiceAccount), strings.Compare(a.Key.RoleARN, b.Key.RoleARN))
	})
	return slices.Values(entries)
}
