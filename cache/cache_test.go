package cache

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// fakeSTS issues sessions like the real one: each has an access key of its own and expires after the key's duration by STS's
// clock. It fails the test when two calls for one key overlap.
type fakeSTS struct {
	t    testing.TB
	skew time.Duration // of STS's clock against the node's

	mu       sync.Mutex
	respond  func(ctx context.Context, key Key, nth int) error // nil: succeeds at once; nth counts a key's calls from 0
	calls    []call                                            // in the order in which they began
	count    map[Key]int
	inFlight map[Key]int
	sessions map[string]Key      // by access key ID
	last     map[Key]Credentials // the newest session
}

type call struct {
	key Key
	at  time.Time
}

func newFakeSTS(t testing.TB) *fakeSTS {
	return &fakeSTS{t: t, count: map[Key]int{}, inFlight: map[Key]int{}, sessions: map[string]Key{}, last: map[Key]Credentials{}}
}

func (f *fakeSTS) Issue(ctx context.Context, key Key) (Credentials, error) {
	f.mu.Lock()
	nth, respond := f.count[key], f.respond
	f.count[key]++
	f.calls = append(f.calls, call{key, time.Now()})
	if f.inFlight[key]++; f.inFlight[key] > 1 {
		f.t.Errorf("%d issues in flight for %s", f.inFlight[key], key.RoleARN)
	}
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.inFlight[key]--
		f.mu.Unlock()
	}()
	if respond != nil {
		if err := respond(ctx, key, nth); err != nil {
			return Credentials{}, err
		}
	}
	now := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	id := fmt.Sprintf("ASIA%06d", len(f.sessions))
	c := NewCredentials(id, "secret of "+id, "token of "+id, now, now.Add(f.skew+key.Duration).Round(0))
	c.RequestID = "request-of-" + id
	f.sessions[id], f.last[key] = key, c
	return c, nil
}

func (f *fakeSTS) issued() []call {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

func (f *fakeSTS) owner(c *Credentials) Key {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.sessions[c.AccessKeyID]
}

func (f *fakeSTS) newest(key Key) (Credentials, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c, ok := f.last[key]
	return c, ok
}

func (f *fakeSTS) set(respond func(ctx context.Context, key Key, nth int) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.respond = respond
}

// after answers what err says, but only when d has passed.
func after(d time.Duration, err error) func(context.Context, Key, int) error {
	return func(ctx context.Context, _ Key, _ int) error {
		select {
		case <-time.After(d):
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// hang answers nothing.
func hang(ctx context.Context, _ Key, _ int) error {
	<-ctx.Done()
	return ctx.Err()
}

// liveSet is what pods there are.
type liveSet struct {
	mu   sync.Mutex
	keys map[Key]bool
}

func (l *liveSet) set(keys map[Key]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keys = maps.Clone(keys)
}

func (l *liveSet) all() iter.Seq2[Key, bool] {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.All(maps.Clone(l.keys))
}

func testKey(i int) Key {
	return Key{
		RoleARN: fmt.Sprintf("arn:aws:iam::123456789012:role/r%03d", i), SessionName: "shop.cart@node",
		Namespace: "shop", ServiceAccount: "cart", Duration: time.Hour,
	}
}

type rig struct {
	*Cache
	t    *testing.T
	sts  *fakeSTS
	live *liveSet
	reg  *prometheus.Registry
	stop func()
}

// start runs a cache in the current synctest bubble until the end of the test.
func start(t *testing.T, change func(*Options), live map[Key]bool) *rig {
	t.Helper()
	r := &rig{t: t, sts: newFakeSTS(t), live: &liveSet{}, reg: prometheus.NewRegistry()}
	r.live.set(live)
	o := Options{
		Issuer: r.sts, Live: r.live.all, Metrics: r.reg,
		Encode: func(c Credentials) []byte { return []byte("document of " + c.AccessKeyID) },
	}
	if change != nil {
		change(&o)
	}
	r.Cache = New(o)
	if err := r.Restore(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(r.stop)
	return r
}

// answering makes the issuer answer so from the first call on, which may come before start returns.
func answering(respond func(ctx context.Context, key Key, nth int) error) func(*Options) {
	return func(o *Options) { o.Issuer.(*fakeSTS).set(respond) }
}

func (r *rig) get(key Key, wait time.Duration) (*Credentials, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), wait)
	defer cancel()
	return r.Get(ctx, key)
}

func (r *rig) mustGet(key Key, wait time.Duration) *Credentials {
	r.t.Helper()
	c, err := r.get(key, wait)
	if err != nil {
		r.t.Fatalf("Get(%s): %v", key.RoleARN, err)
	}
	return c
}

// metrics are all values by name and label value: imdsgate_credentials_requests_total/hit.
func (r *rig) metrics() map[string]float64 {
	r.t.Helper()
	families, err := r.reg.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := strings.TrimPrefix(f.GetName(), "imdsgate_credentials_")
			for _, l := range m.GetLabel() {
				name += "/" + l.GetValue()
			}
			values[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return values
}

func (r *rig) entries() map[string]Entry {
	entries := map[string]Entry{}
	for e := range r.Snapshot() {
		entries[e.Key.RoleARN] = e
	}
	return entries
}

// take counts and forgets the calls so far.
func (f *fakeSTS) take() []call {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

var errDown = errors.New("dial tcp: connection refused")

func denied() error {
	return &IssueError{Code: "AccessDenied", Denied: true, Err: errors.New("AccessDenied: not authorized to perform sts:AssumeRole"), Hint: "change the role's trust policy"}
}

func TestPrefetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		eager, lazy := testKey(1), testKey(2)
		r := start(t, nil, map[Key]bool{eager: true, lazy: false})
		synctest.Wait()
		if c := r.Peek(&eager, nil, time.Now()); c == nil {
			t.Error("a live pod's key was not prefetched")
		} else if got, want := string(c.Document()), "document of "+c.AccessKeyID; got != want {
			t.Errorf("document %q, want %q", got, want)
		}
		if r.Peek(&lazy, nil, time.Now()) != nil || len(r.sts.issued()) != 1 {
			t.Error("issued for a pod that gets its credentials elsewhere")
		}
		r.mustGet(lazy, 450*time.Millisecond)
		time.Sleep(40 * time.Minute)
		synctest.Wait()
		if n := len(r.sts.issued()); n != 4 {
			t.Errorf("%d issues, want 2 for each key: what was asked for once is kept fresh", n)
		}
		// The pods change places.
		r.live.set(map[Key]bool{lazy: true, testKey(3): true})
		r.Wake()
		r.Wake()
		synctest.Wait()
		if k := testKey(3); r.Peek(&k, nil, time.Now()) == nil || r.Peek(&lazy, nil, time.Now()) == nil || r.Peek(&eager, nil, time.Now()) != nil {
			t.Error("Wake did not make the cache follow the live set")
		}
	})
}

// variants are keys that differ from base in one field each, by field.
func variants(t *testing.T, base Key) map[string]Key {
	keys := map[string]Key{}
	var walk func(prefix string, index []int, typ reflect.Type)
	walk = func(prefix string, index []int, typ reflect.Type) {
		for f := range typ.Fields() {
			at := append(slices.Clone(index), f.Index...)
			if f.Type.Kind() == reflect.Struct {
				walk(prefix+f.Name+".", at, f.Type)
				continue
			}
			key := base
			switch v := reflect.ValueOf(&key).Elem().FieldByIndex(at); v.Kind() {
			case reflect.String:
				v.SetString(v.String() + "x")
			case reflect.Int64:
				v.SetInt(v.Int() + int64(time.Second))
			default:
				t.Fatalf("field %s: a %s does not make keys of equal content equal", f.Name, v.Kind())
			}
			keys[prefix+f.Name] = key
		}
	}
	walk("", nil, reflect.TypeFor[Key]())
	return keys
}

func TestKeyHoldsEveryInput(t *testing.T) {
	got := slices.Sorted(maps.Keys(variants(t, testKey(1))))
	want := []string{"Audience", "Duration", "ExternalID", "Namespace", "RoleARN", "ServiceAccount", "SessionName",
		"Tags.ClusterName", "Tags.Namespace", "Tags.ServiceAccount"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("fields of Key (-want +got):\n%s", diff)
	}
	// The key is the only thing about the session that the issuer gets to see.
	if issue := reflect.TypeFor[Issuer]().Method(0).Type; issue.NumIn() != 2 || issue.In(1) != reflect.TypeFor[Key]() {
		t.Errorf("Issue has inputs beside the key: %v", issue)
	}
}

func TestUnequalKeysShareNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		live := map[Key]bool{testKey(1): true}
		for _, key := range variants(t, testKey(1)) {
			live[key] = true
		}
		r := start(t, func(o *Options) { o.Rate = 100 }, live)
		synctest.Wait()
		if n := len(r.sts.issued()); n != len(live) {
			t.Errorf("%d issues for %d keys", n, len(live))
		}
		for key := range live {
			if c := r.Peek(&key, nil, time.Now()); c == nil {
				t.Errorf("nothing for %+v", key)
			} else if owner := r.sts.owner(c); owner != key {
				t.Errorf("%+v got the credentials of %+v", key, owner)
			}
			if c, err := r.Get(t.Context(), key); err != nil || r.sts.owner(c) != key {
				t.Errorf("who waits for %+v gets those of another key, %v", key, err)
			}
		}
	})
}

func TestSingleFlight(t *testing.T) {
	for _, live := range []map[Key]bool{nil, {testKey(1): false}, {testKey(1): true}} {
		synctest.Test(t, func(t *testing.T) {
			r := start(t, answering(after(200*time.Millisecond, nil)), live)
			var wg sync.WaitGroup
			for range 100 {
				wg.Go(func() {
					if _, err := r.get(testKey(1), 450*time.Millisecond); err != nil {
						t.Errorf("Get: %v", err)
					}
				})
			}
			wg.Wait()
			if n := len(r.sts.issued()); n != 1 {
				t.Errorf("%d issues for 100 requests at once, want 1", n)
			}
			if m := r.metrics(); m["requests_total/wait"] != 100 {
				t.Errorf("metrics %v, want 100 waits", m)
			}
		})
	}
}

func TestWaitersHaveTheirOwnDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, answering(after(time.Second, nil)), map[Key]bool{testKey(1): true})
		began := time.Now()
		var wg sync.WaitGroup
		for _, tt := range []struct{ wait, want time.Duration }{
			{100 * time.Millisecond, 100 * time.Millisecond}, {450 * time.Millisecond, 450 * time.Millisecond}, {5 * time.Second, time.Second},
		} {
			wg.Go(func() {
				_, err := r.get(testKey(1), tt.wait)
				if took := time.Since(began); took != tt.want || (err == nil) != (tt.wait > time.Second) {
					t.Errorf("a Get with %s to wait took %s: %v", tt.wait, took, err)
				}
				if err != nil && !errors.Is(err, ErrUnavailable) {
					t.Errorf("error %v is not ErrUnavailable", err)
				}
			})
		}
		wg.Wait()
		if n := len(r.sts.issued()); n != 1 {
			t.Errorf("%d issues, want 1", n)
		}
	})
}

func TestLeavingDoesNotCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := testKey(1)
		r := start(t, nil, map[Key]bool{key: false})
		r.sts.set(after(9*time.Second, nil))
		if _, err := r.get(key, 450*time.Millisecond); !errors.Is(err, ErrUnavailable) {
			t.Errorf("Get: %v, want ErrUnavailable", err)
		}
		time.Sleep(9 * time.Second)
		synctest.Wait()
		if r.Peek(&key, nil, time.Now()) == nil {
			t.Error("the issue did not end in spite of its caller")
		}
	})
}

func TestIssueTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := testKey(1)
		var hung time.Duration
		r := start(t, answering(func(ctx context.Context, key Key, nth int) error {
			began := time.Now()
			if nth > 0 {
				return nil
			}
			defer func() { hung = time.Since(began) }()
			return hang(ctx, key, nth)
		}), map[Key]bool{key: true})
		if _, err := r.get(key, 5*time.Second); !errors.Is(err, ErrUnavailable) {
			t.Errorf("Get: %v, want ErrUnavailable", err)
		}
		r.mustGet(key, time.Minute)
		if hung != issueTimeout {
			t.Errorf("the first issue ended after %s, want %s", hung, issueTimeout)
		}
	})
}

func TestFailedRefreshKeepsValue(t *testing.T) {
	for name, failure := range map[string]error{"down": errDown, "denied": denied()} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				key := testKey(1)
				r := start(t, nil, map[Key]bool{key: true})
				first := *r.mustGet(key, time.Second)
				r.sts.set(func(context.Context, Key, int) error { return failure })
				time.Sleep(35 * time.Minute)
				synctest.Wait()
				if n := len(r.sts.issued()); n < 2 {
					t.Fatal("no refresh was tried")
				}
				for time.Now().Before(first.Expires.Add(-margin)) {
					if c := r.Peek(&key, nil, time.Now()); c == nil || *c != first {
						t.Fatalf("a failed refresh replaced a valid value by %v", c)
					}
					if c := r.mustGet(key, 0); *c != first {
						t.Fatalf("a failed refresh replaced a valid value by %v", c)
					}
					time.Sleep(time.Minute)
				}
				if m := r.metrics(); m["requests_total/stale"] < 40 || m["requests_total/hit"] > 1 {
					t.Errorf("metrics %v, want these requests counted as stale", m)
				}
				// Then comes the error itself, at once: nobody but the issuer can help.
				_, err := r.get(key, 0)
				if name == "denied" && err != failure || name == "down" && !(errors.Is(err, ErrUnavailable) && errors.Is(err, errDown)) {
					t.Errorf("Get: %v", err)
				}
			})
		})
	}
}

func TestNeverServedInLastMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := testKey(1)
		r := start(t, nil, map[Key]bool{key: true})
		expires := r.mustGet(key, time.Second).Expires
		r.sts.set(after(0, errDown))
		time.Sleep(time.Until(expires) - margin - time.Nanosecond)
		if r.Peek(&key, nil, time.Now()) == nil {
			t.Error("not served just before the last minute")
		}
		time.Sleep(time.Nanosecond)
		if c := r.Peek(&key, nil, time.Now()); c != nil {
			t.Errorf("%v was served with %s left", c, time.Until(expires))
		}
		if c, err := r.get(key, 450*time.Millisecond); err == nil {
			t.Errorf("%v was served with %s left", c, time.Until(expires))
		}
		if m := r.metrics(); m["entries/failed"] != 1 || m["entries/ready"] != 0 {
			t.Errorf("metrics %v, want 1 failed", m)
		}
		// It is back when STS is, with the next try: at most 66 s.
		r.sts.set(nil)
		if c := r.mustGet(key, 67*time.Second); time.Until(c.Expires) < 59*time.Minute {
			t.Errorf("got %v", c)
		}
	})
}

func TestRefreshAtHalfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 200
		live := map[Key]bool{}
		for i := range n {
			live[testKey(i)] = true
		}
		r := start(t, func(o *Options) { o.Rate = 1000 }, live)
		time.Sleep(34 * time.Minute)
		synctest.Wait()
		first := map[Key]time.Time{}
		seconds := map[time.Duration]bool{}
		for _, c := range r.sts.issued() {
			began, again := first[c.key]
			if !again {
				first[c.key] = c.at
				continue
			}
			age := c.at.Sub(began)
			if age < 27*time.Minute || age > 33*time.Minute+time.Second {
				t.Errorf("refreshed after %s, want 30 min ± 10 %%", age)
			}
			seconds[age.Truncate(time.Second)] = true
		}
		if calls := len(r.sts.issued()); calls != 2*n {
			t.Errorf("%d issues, want %d", calls, 2*n)
		}
		if len(seconds) < n/4 {
			t.Errorf("%d refreshes fell on %d seconds: no jitter", n, len(seconds))
		}
	})
}

func TestRefreshLeavesTwentyMinutes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := testKey(1)
		key.Duration = 45 * time.Minute // the shortest that -session-duration takes
		r := start(t, answering(after(2*time.Second, nil)), map[Key]bool{key: true})
		r.mustGet(key, 3*time.Second)
		for range 2 * 24 * 60 {
			time.Sleep(30 * time.Second)
			if c := r.Peek(&key, nil, time.Now()); c == nil || time.Until(c.Expires) < 20*time.Minute {
				t.Fatalf("served %v with %s left", c, time.Until(c.Expires))
			}
		}
	})
}

func TestDueTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 200
		live := map[Key]bool{}
		for i := range n {
			live[testKey(i)] = true
		}
		r := start(t, nil, live)
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if m := r.metrics(); m["entries/ready"] != n {
			t.Fatalf("metrics %v, want %d ready", m, n)
		}
		r.sts.take()
		r.sts.set(after(2*time.Second, nil))
		r.mu.Lock()
		for _, e := range r.Cache.entries {
			v := *e.value
			v.refreshAt = time.Now().Add(time.Second)
			e.value = &v
		}
		r.mu.Unlock()
		r.Wake()
		for range 120 {
			time.Sleep(250 * time.Millisecond)
			for key := range live {
				r.mustGet(key, 450*time.Millisecond)
			}
		}
		if calls := len(r.sts.issued()); calls != n {
			t.Errorf("%d refreshes, want %d", calls, n)
		}
		if m := r.metrics(); m["requests_total/hit"] != 120*n || m["requests_total/wait"] != 0 {
			t.Errorf("metrics %v, want no request to have waited", m)
		}
	})
}

func TestBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := testKey(1)
		r := start(t, nil, nil)
		r.sts.set(after(0, errDown))
		r.live.set(map[Key]bool{key: true})
		r.Wake()
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		want := []float64{1, 2, 4, 8, 16, 32, 60, 60}
		calls := r.sts.issued()
		if len(calls) < len(want)+1 {
			t.Fatalf("%d tries in 4 min, want at least %d", len(calls), len(want)+1)
		}
		for i, seconds := range want {
			if wait := calls[i+1].at.Sub(calls[i].at).Seconds(); wait < 0.9*seconds || wait > 1.1*seconds+0.001 {
				t.Errorf("try %d came after %.2f s, want %v s ± 10 %%", i+1, wait, seconds)
			}
		}
		// Success resets it.
		r.sts.set(nil)
		r.mustGet(key, 2*time.Minute)
		r.sts.set(after(0, errDown))
		r.sts.take()
		time.Sleep(34 * time.Minute)
		synctest.Wait()
		if calls = r.sts.issued(); calls[1].at.Sub(calls[0].at) > 1100*time.Millisecond {
			t.Errorf("the second try came after %s, want 1 s", calls[1].at.Sub(calls[0].at))
		}
	})
}

func TestRememberedError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := testKey(1)
		live := liveSet{keys: map[Key]bool{key: false}}
		var passes atomic.Int32
		r := start(t, func(o *Options) {
			o.Live = func() iter.Seq2[Key, bool] { passes.Add(1); return live.all() }
		}, nil)
		failure := denied()
		r.sts.set(after(100*time.Millisecond, failure))
		began := time.Now()
		if _, err := r.get(key, 450*time.Millisecond); err != failure || time.Since(began) != 100*time.Millisecond {
			t.Errorf("Get: %v after %s, want the denial as soon as it comes", err, time.Since(began))
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		passes.Store(0)
		calls, began := len(r.sts.issued()), time.Now()
		for range 1000 {
			if _, err := r.get(key, 100*time.Millisecond); err != failure {
				t.Fatalf("Get: %v, want the denial itself", err)
			}
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("1000 refused requests took %s, want none to wait: the next try lies beyond their deadlines", took)
		}
		if n := len(r.sts.issued()); n != calls {
			t.Errorf("%d issues for them", n-calls)
		}
		synctest.Wait()
		if n := passes.Load(); n != 0 {
			t.Errorf("the loop ran %d times for them", n)
		}
		if e := r.entries()[key.RoleARN]; e.State != Failed || e.Err != failure || !e.NextIssue.After(began) {
			t.Errorf("entry %+v", e)
		}
		// One that can wait for the next try does.
		r.sts.set(nil)
		r.mustGet(key, 20*time.Second)
		if n := len(r.sts.issued()); n != calls+1 {
			t.Errorf("%d issues, want 1", n-calls)
		}
	})
}

func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cart, till, other := testKey(1), testKey(2), testKey(3)
		till.ServiceAccount, other.Namespace = "till", "bank"
		r := start(t, nil, nil)
		r.sts.set(after(0, denied()))
		r.live.set(map[Key]bool{cart: true, till: true, other: true})
		r.Wake()
		time.Sleep(100 * time.Second) // the next tries are far away
		for _, tt := range []struct {
			namespace, account string
			want               []Key
		}{
			{"shop", "cart", []Key{cart}},
			{"shop", "", []Key{cart, till}},
			{"bank", "cart", []Key{other}},
			{"none", "", nil},
		} {
			synctest.Wait()
			r.sts.take()
			r.Retry(tt.namespace, tt.account)
			synctest.Wait()
			var got []Key
			for _, c := range r.sts.take() {
				got = append(got, c.key)
			}
			slices.SortFunc(got, func(a, b Key) int { return strings.Compare(a.RoleARN, b.RoleARN) })
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("Retry(%q, %q) issued (-want +got):\n%s", tt.namespace, tt.account, diff)
			}
		}
	})
}

func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, limit = 200, 10
		live := map[Key]bool{}
		for i := range n {
			live[testKey(i)] = true
		}
		began := time.Now()
		r := start(t, func(o *Options) { o.Rate = limit }, live)
		time.Sleep(time.Minute)
		synctest.Wait()
		calls := r.sts.issued()
		if len(calls) != n {
			t.Fatalf("%d issues, want %d", len(calls), n)
		}
		for i, c := range calls {
			if most := limit + limit*c.at.Sub(began).Seconds() + 1e-6; float64(i+1) > most {
				t.Errorf("%d issues after %s", i+1, c.at.Sub(began))
			}
		}
		// Charged once each: twice would take 40 s.
		if took := calls[n-1].at.Sub(began); took > 20*time.Second {
			t.Errorf("%d issues took %s", n, took)
		}
	})
}

func TestAskedKeyComesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		live := map[Key]bool{}
		for i := range 200 {
			live[testKey(i)] = true
		}
		lazy := testKey(500)
		live[lazy] = false
		r := start(t, answering(after(50*time.Millisecond, nil)), live)
		synctest.Wait()
		before := len(r.sts.issued())
		asked := testKey(0)
		for key := range live {
			if r.Peek(&key, nil, time.Now()) == nil && key != lazy && !slices.ContainsFunc(r.sts.issued(), func(c call) bool { return c.key == key }) {
				asked = key
			}
		}
		began := time.Now()
		r.mustGet(asked, 450*time.Millisecond)
		if calls := r.sts.issued(); calls[before].key != asked || time.Since(began) != 50*time.Millisecond {
			t.Errorf("the key that was asked for came after %s, behind %d others", time.Since(began),
				slices.IndexFunc(calls[before:], func(c call) bool { return c.key == asked }))
		}
		// With an empty bucket it is the next one.
		began = time.Now()
		r.mustGet(lazy, 450*time.Millisecond)
		if took := time.Since(began); took > 160*time.Millisecond {
			t.Errorf("the second took %s, want no more than a token and an issue", took)
		}
	})
}

func TestAskedKeysInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, func(o *Options) { o.Rate = 1 }, nil)
		r.mustGet(testKey(0), time.Second) // the only token
		var want, got []Key
		for i := range 30 {
			key := testKey(1 + i*7%30)
			want = append(want, key)
			go func() { _, _ = r.get(key, time.Minute) }()
			time.Sleep(time.Millisecond)
		}
		r.sts.take()
		time.Sleep(time.Minute)
		for _, c := range r.sts.take() {
			got = append(got, c.key)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("keys in the order in which they were asked for (-want +got):\n%s", diff)
		}
	})
}

func TestUrgency(t *testing.T) {
	now := time.Now()
	waitingLong, waiting := &entry{waiters: 1, waitingSince: now.Add(-time.Second)}, &entry{waiters: 3, waitingSince: now}
	asked := &entry{asked: true}
	expired := &entry{value: &value{serveUntil: now.Add(-time.Minute)}, prefetch: true}
	soon, late := &entry{value: &value{serveUntil: now.Add(time.Minute)}}, &entry{value: &value{serveUntil: now.Add(time.Hour)}, asked: true}
	cold := &entry{prefetch: true}
	want := []*entry{waitingLong, waiting, asked, expired, soon, late, cold}
	got := []*entry{cold, late, soon, waiting, expired, asked, waitingLong}
	slices.SortFunc(got, byUrgency)
	if !slices.Equal(got, want) {
		for i, e := range got {
			t.Errorf("%d: position %d of the order wanted", i, slices.Index(want, e))
		}
	}
}

func TestHangingIssuesStarveNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		live := map[Key]bool{}
		for i := range 100 {
			live[testKey(i)] = true
		}
		r := start(t, func(o *Options) { o.Rate = 1000 }, nil)
		asked := testKey(500)
		r.sts.set(func(ctx context.Context, key Key, nth int) error {
			if key == asked {
				return nil
			}
			return hang(ctx, key, nth)
		})
		r.live.set(live)
		r.Wake()
		synctest.Wait()
		if n := len(r.sts.issued()); n != maxBackground {
			t.Errorf("%d issues in flight that nobody asked for, want %d", n, maxBackground)
		}
		began := time.Now()
		r.mustGet(asked, 450*time.Millisecond)
		if took := time.Since(began); took != 0 {
			t.Errorf("a key that is asked for waited %s for keys that hang", took)
		}
		// Nor do requests for keys that hang make others wait.
		for i := range 50 {
			go func() { _, _ = r.get(testKey(i), 450*time.Millisecond) }()
		}
		synctest.Wait()
		asked = testKey(501)
		r.mustGet(asked, 450*time.Millisecond)
		// The hanging ones give their places up.
		time.Sleep(21 * time.Second)
		synctest.Wait()
		if n := len(r.sts.issued()); n < 3*maxBackground {
			t.Errorf("%d issues after 21 s", n)
		}
	})
}

func TestPanicDoesNotWedge(t *testing.T) {
	failures := map[string]func(){"panic": func() { panic("token of ASIA") }, "goexit": runtime.Goexit}
	for name, fail := range failures {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := start(t, nil, nil)
				r.sts.set(func(_ context.Context, _ Key, nth int) error {
					if nth == 0 {
						fail()
					}
					return nil
				})
				if _, err := r.get(testKey(1), 450*time.Millisecond); !errors.Is(err, ErrUnavailable) || strings.Contains(err.Error(), "token") {
					t.Errorf("Get: %v", err)
				}
				r.mustGet(testKey(1), 2*time.Second)
			})
		})
	}
	t.Run("encode", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := start(t, func(o *Options) { o.Encode = func(Credentials) []byte { panic("encode") } }, nil)
			if c, err := r.get(testKey(1), 450*time.Millisecond); !errors.Is(err, ErrUnavailable) {
				t.Errorf("Get: %v, %v", c, err)
			}
		})
	})
}

func TestUselessAnswers(t *testing.T) {
	for name, c := range map[string]Credentials{
		"zero": {}, "no secret": {AccessKeyID: "ASIA", Expires: time.Now().Add(time.Hour)},
		"no id": NewCredentials("", "secret", "token", time.Now(), time.Now().Add(time.Hour)),
	} {
		if v, err := newValue(c, time.Hour, 0, time.Now(), nil); err == nil {
			t.Errorf("%s: %v counts as credentials", name, v.creds)
		}
	}
}

func TestEviction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := testKey(1), testKey(2)
		r := start(t, nil, map[Key]bool{a: true, b: true})
		synctest.Wait()
		if n := len(r.entries()); n != 2 {
			t.Fatalf("%d entries, want 2", n)
		}
		r.live.set(map[Key]bool{b: true})
		r.Wake()
		synctest.Wait()
		if r.Peek(&a, nil, time.Now()) != nil || r.Peek(&b, nil, time.Now()) == nil || len(r.entries()) != 1 {
			t.Error("a key without a pod stayed, or one with a pod did not")
		}
		// While an issue is in flight and while somebody waits, the entry stays: another would break the single flight.
		r.sts.set(after(5*time.Second, nil))
		stranger := testKey(3)
		if _, err := r.get(stranger, 450*time.Millisecond); !errors.Is(err, ErrUnavailable) {
			t.Errorf("Get: %v", err)
		}
		r.Wake()
		synctest.Wait()
		r.mustGet(stranger, 5*time.Second)
		if n := len(r.sts.issued()); n != 3 {
			t.Errorf("%d issues, want 3", n)
		}
		synctest.Wait()
		if n := len(r.entries()); n != 1 {
			t.Errorf("%d entries, want that without a pod gone as soon as nobody waits", n)
		}
		// Strangers by the thousand, each refused and remembered, leave nothing behind.
		r.sts.set(after(0, denied()))
		for i := range 1000 {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			_, _ = r.Get(ctx, testKey(1000+i))
		}
		synctest.Wait()
		time.Sleep(resync + issueTimeout)
		synctest.Wait()
		if n := len(r.entries()); n != 1 {
			t.Errorf("%d entries, want 1", n)
		}
	})
}

// The live set is read when it may have changed, not whenever an issue ends: on a full node hundreds end within a minute.
func TestLiveIsReadWhenItChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 100
		var reads atomic.Int32
		r := start(t, func(o *Options) {
			live := o.Live
			o.Live = func() iter.Seq2[Key, bool] { reads.Add(1); return live() }
		}, keys(n))
		time.Sleep(75 * time.Minute) // the first sessions, and all of their refreshes
		synctest.Wait()
		if issued := len(r.sts.issued()); issued < 2*n {
			t.Fatalf("%d issues, want two of each", issued)
		}
		if got, most := int(reads.Load()), int(75*time.Minute/resync)+1; got > most || got < most/2 {
			t.Errorf("read %d times in 75 min, want twice a minute or half as often", got)
		}
		for range 10 {
			before := reads.Load()
			r.Wake()
			synctest.Wait()
			if got := reads.Load(); got != before+1 {
				t.Errorf("read %d times after Wake, want once", got-before)
			}
		}
	})
}

// A key may be asked for before Run has read that a pod has it. It is not evicted for that.
func TestAskedBeforeItIsRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := testKey(1)
		r := start(t, nil, nil)
		synctest.Wait()
		r.live.set(map[Key]bool{key: false}) // and nobody wakes Run
		r.sts.set(after(0, errDown))
		if _, err := r.get(key, 100*time.Millisecond); err == nil {
			t.Fatal("no error")
		}
		synctest.Wait()
		r.sts.set(nil)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if r.Peek(&key, nil, time.Now()) == nil {
			t.Error("evicted although a pod has it")
		}
	})
}

// An entry is evicted only by what was read after everything that is known of it: it may be new, or a pod may have come for it while its
// issue was in flight.
func TestNewEntryIsNotEvicted(t *testing.T) {
	for _, tt := range []struct {
		fresh, stale bool
		want         int
	}{{false, false, 1}, {false, true, 1}, {true, true, 1}, {true, false, 0}} {
		c := New(Options{Issuer: newFakeSTS(t), Live: (&liveSet{}).all})
		c.store, c.unkept = &store{}, make(map[Key]*value)
		c.newEntry(testKey(1))
		c.stale.Store(tt.stale)
		c.next(time.Now(), tt.fresh)
		if len(c.entries) != tt.want || len(c.unkept) != 0 { // it has nothing that could have been kept
			t.Errorf("%d entries and %d changes for the store, want %d and none: %+v", len(c.entries), len(c.unkept), tt.want, tt)
		}
		if again := len(c.wake) == 1 && c.stale.Load(); again != (tt.want == 1) {
			t.Errorf("the live set is read again: %v: %+v", again, tt)
		}
	}
	c := New(Options{Issuer: newFakeSTS(t), Live: (&liveSet{}).all})
	left, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Get(left, testKey(1)); err == nil || !c.stale.Load() {
		t.Errorf("an entry that Get made, of which nothing was read: %v", err)
	}
}

// A Ref leads to what the cache has for its key now, also after a refresh and after the key was gone for a while, and keeps nothing of
// a key that has gone.
func TestRef(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := testKey(1)
		r := start(t, nil, map[Key]bool{key: true})
		var ref Ref
		check := func(when string) *Credentials {
			t.Helper()
			synctest.Wait()
			now := time.Now()
			got, want := r.Peek(&key, &ref, now), r.Peek(&key, nil, now)
			if got != want {
				t.Errorf("%s: %v, want %v", when, got, want)
			}
			return got
		}
		first := check("issued")
		time.Sleep(40 * time.Minute)
		if second := check("refreshed"); first == nil || second == nil || second.AccessKeyID == first.AccessKeyID {
			t.Errorf("%v after %v", second, first)
		}
		r.live.set(nil)
		r.Wake()
		if got := check("gone"); got != nil {
			t.Errorf("%v of a key without a pod", got)
		}
		if ref.entry.Load().value != nil {
			t.Error("the ref keeps credentials of a key that has gone")
		}
		r.live.set(map[Key]bool{key: true})
		r.Wake()
		if got := check("here again"); got == nil {
			t.Error("nothing for a key that is here again")
		}
		r.sts.set(after(0, errDown))
		time.Sleep(time.Hour)
		if got := check("expired"); got != nil {
			t.Errorf("expired %v", got)
		}
	})
}

// Several pods may hold a key. It is prefetched if one of them wants it to be, and only as long as that one lives.
func TestSharedKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := testKey(1)
		wants := []bool{true, false}
		var mu sync.Mutex
		live := func() iter.Seq2[Key, bool] {
			return func(yield func(Key, bool) bool) {
				mu.Lock()
				defer mu.Unlock()
				for _, prefetch := range wants {
					yield(key, prefetch)
				}
			}
		}
		r := start(t, func(o *Options) { o.Live = live }, nil)
		time.Sleep(40 * time.Minute)
		synctest.Wait()
		if n := len(r.sts.issued()); n != 2 {
			t.Errorf("%d issues, want 2", n)
		}
		mu.Lock()
		wants = []bool{false}
		mu.Unlock()
		r.Wake()
		synctest.Wait()
		if r.Peek(&key, nil, time.Now()) == nil {
			t.Error("a key that a pod still holds was evicted")
		}
		time.Sleep(3 * time.Hour)
		synctest.Wait()
		if n := len(r.sts.issued()); n != 2 {
			t.Errorf("%d issues, want none for a pod that has never asked", n-2)
		}
	})
}

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good, slow, bad, longer := testKey(1), testKey(2), testKey(3), testKey(4)
		longer.Duration = 2 * time.Hour
		r := start(t, nil, nil)
		r.sts.set(func(ctx context.Context, key Key, nth int) error {
			switch key {
			case slow:
				return hang(ctx, key, nth)
			case bad:
				return denied()
			}
			return nil
		})
		if m := r.metrics(); len(m) != 7 {
			t.Errorf("metrics %v, want every result and state from the start and no expiry yet", m)
		}
		r.live.set(map[Key]bool{good: true, slow: true, bad: true, longer: true})
		r.Wake()
		synctest.Wait()
		c := r.mustGet(good, 0)
		r.Peek(&good, nil, time.Now())
		r.Peek(&bad, nil, time.Now())
		_, _ = r.get(bad, 0)
		_, _ = r.get(slow, time.Millisecond)
		want := map[string]float64{
			"requests_total/hit": 2, "requests_total/wait": 0, "requests_total/stale": 0, "requests_total/error": 2,
			"entries/ready": 2, "entries/pending": 1, "entries/failed": 1,
			"soonest_expiry_timestamp_seconds": float64(c.Expires.UnixMilli()) / 1000,
		}
		if diff := cmp.Diff(want, r.metrics()); diff != "" {
			t.Errorf("metrics (-want +got):\n%s", diff)
		}
		if problems, err := testutil.GatherAndLint(r.reg); err != nil || len(problems) > 0 {
			t.Error(problems, err)
		}
	})
}

func TestLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		key := testKey(1)
		r := start(t, func(o *Options) {
			o.Log = slog.New(slog.NewJSONHandler(&out, nil))
			answering(func(_ context.Context, _ Key, nth int) error {
				if nth == 0 {
					return denied()
				}
				return nil
			})(o)
		}, map[Key]bool{key: true})
		c := r.mustGet(key, 2*time.Second)
		synctest.Wait()
		var lines []map[string]any
		for line := range strings.Lines(out.String()) {
			var m map[string]any
			if err := json.Unmarshal([]byte(line), &m); err != nil {
				t.Fatal(err)
			}
			delete(m, "time")
			lines = append(lines, m)
		}
		if len(lines) == 2 {
			delete(lines[0], "retry_in")
		}
		want := []map[string]any{{
			"level": "WARN", "msg": "issuing session failed", "error": denied().Error(), "namespace": "shop", "service_account": "cart",
			"role_arn": key.RoleARN, "session_name": key.SessionName,
		}, {
			"level": "INFO", "msg": "session issued", "namespace": "shop", "service_account": "cart", "role_arn": key.RoleARN,
			"session_name": key.SessionName, "access_key_id": c.AccessKeyID, "expires": c.Expires.UTC().Format(time.RFC3339Nano),
			"sts_request_id": "request-of-" + c.AccessKeyID,
		}}
		if diff := cmp.Diff(want, lines); diff != "" {
			t.Errorf("log (-want +got):\n%s", diff)
		}
	})
}

func TestRunEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		sts, ctx, cancel := newFakeSTS(t), context.Context(nil), context.CancelFunc(nil)
		ctx, cancel = context.WithCancel(t.Context())
		sts.set(func(ctx context.Context, key Key, nth int) error {
			<-ctx.Done()
			time.Sleep(time.Second)
			return ctx.Err()
		})
		live := liveSet{keys: map[Key]bool{testKey(1): true}}
		c := New(Options{Issuer: sts, Live: live.all, Log: slog.New(slog.NewTextHandler(&out, nil))})
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		synctest.Wait()
		began := time.Now()
		cancel()
		if err := <-done; err != nil || time.Since(began) != time.Second {
			t.Errorf("Run ended after %s: %v; want it to end with the issue that it cancelled", time.Since(began), err)
		}
		if out.Len() > 0 {
			t.Errorf("ending was logged as a failure: %s", &out)
		}
	})
}

// After thousands of random events it still holds that a key's issues do not overlap (fakeSTS looks), that what is served
// belongs to its key and has more than 60 s left, and that a session that was issued is served until then.
func TestRandomSchedules(t *testing.T) {
	seeds := 25
	if testing.Short() {
		seeds = 5
	}
	for seed := range seeds {
		synctest.Test(t, func(t *testing.T) { randomSchedule(t, rand.New(rand.NewPCG(uint64(seed), 1))) })
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func randomSchedule(t *testing.T, random *rand.Rand) {
	const keys = 6
	key := func(i int) Key {
		k := testKey(i)
		k.Duration = time.Duration(1+i) * 15 * time.Minute
		return k
	}
	r := start(t, func(o *Options) { o.Rate = 2 }, nil)
	check := func(k Key, c *Credentials) {
		t.Helper()
		if owner := r.sts.owner(c); owner != k {
			t.Errorf("%v was served for %s but issued for %s", c, k.RoleARN, owner.RoleARN)
		}
		if left := time.Until(c.Expires); left <= margin {
			t.Errorf("%v was served with %s left", c, left)
		}
		if string(c.Document()) != "document of "+c.AccessKeyID {
			t.Errorf("%v was served with document %q", c, c.Document())
		}
	}
	answers := []func(context.Context, Key, int) error{
		nil, nil, after(300*time.Millisecond, nil), after(9*time.Second, nil), hang, after(time.Second, errDown), after(0, denied()),
		func(context.Context, Key, int) error { panic("issuer") },
	}
	live := map[Key]bool{}
	liveSince := map[Key]time.Time{}
	for range 300 {
		switch k := key(random.IntN(keys)); random.IntN(8) {
		case 0, 1:
			wait := time.Duration(random.IntN(900)) * time.Millisecond
			go func() {
				if c, err := r.get(k, wait); err == nil {
					check(k, c)
				} else if _, denied := errors.AsType[*IssueError](err); !denied && !errors.Is(err, ErrUnavailable) {
					t.Errorf("Get: %v", err)
				}
			}()
		case 2:
			answer := answers[random.IntN(len(answers))]
			fails := key(random.IntN(keys))
			r.sts.set(func(ctx context.Context, k Key, nth int) error {
				if answer == nil || k == fails && nth%2 == 0 {
					return nil
				}
				return answer(ctx, k, nth)
			})
		case 3:
			if _, ok := live[k]; ok {
				delete(live, k)
				delete(liveSince, k)
			} else {
				live[k] = random.IntN(3) > 0
				liveSince[k] = time.Now()
			}
			r.live.set(live)
			r.Wake()
		case 4:
			r.Retry(k.Namespace, "")
		case 5:
			time.Sleep(time.Duration(random.IntN(3000)) * time.Millisecond)
		case 6:
			time.Sleep(time.Duration(random.IntN(20)) * time.Minute)
		}
		synctest.Wait()
		for i := range keys {
			k := key(i)
			c := r.Peek(&k, nil, time.Now())
			if c != nil {
				check(k, c)
			}
			newest, ok := r.sts.newest(k)
			since, lives := liveSince[k]
			if ok && lives && newest.Issued.After(since) && time.Until(newest.Expires) > margin && (c == nil || c.AccessKeyID != newest.AccessKeyID) {
				t.Errorf("%v is valid, but %v was served", newest, c)
			}
		}
		if t.Failed() {
			return
		}
	}
}

func TestPeekDoesNotAllocate(t *testing.T) {
	c, key := readyCache(t)
	other := testKey(2)
	if n := testing.AllocsPerRun(1000, func() {
		if c.Peek(&key, nil, time.Now()) == nil || c.Peek(&other, nil, time.Now()) != nil {
			t.Error("wrong")
		}
	}); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

// readyCache is a cache that runs outside of a synctest bubble and has credentials for one key.
func readyCache(t testing.TB) (*Cache, Key) {
	key := testKey(1)
	live := liveSet{keys: map[Key]bool{key: true}}
	for i := range 100 {
		live.keys[testKey(100+i)] = false
	}
	c := New(Options{Issuer: newFakeSTS(t), Live: live.all, Metrics: prometheus.NewRegistry()})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	if _, err := c.Get(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	return c, key
}

func BenchmarkPeek(b *testing.B) {
	var ref Ref
	b.Run("serial", func(b *testing.B) {
		c, key := readyCache(b)
		b.ReportAllocs()
		for b.Loop() {
			if c.Peek(&key, &ref, time.Now()) == nil {
				b.Fatal("nothing")
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		c, key := readyCache(b)
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if c.Peek(&key, &ref, time.Now()) == nil {
					b.Error("nothing")
				}
			}
		})
	})
}
