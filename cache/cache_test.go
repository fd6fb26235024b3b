package cache

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// fakeSTS issues sessions like the real one: each answer is unique, bears its key's name and expires after the key's
// duration by STS's clock. It fails the test when two calls for one key overlap.
type fakeSTS struct {
	t    *testing.T
	skew time.Duration // of STS's clock against the node's

	mu       sync.Mutex
	calls    []call // in the order in which they began
	inFlight map[Key]int
	respond  func(ctx context.Context, key Key, nth int) error // nil: at once; nth counts a key's calls from 0
	count    map[Key]int
}

type call struct {
	key Key
	at  time.Time
}

func (f *fakeSTS) Issue(ctx context.Context, key Key) (Credentials, error) {
	f.mu.Lock()
	if f.count == nil {
		f.count, f.inFlight = map[Key]int{}, map[Key]int{}
	}
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
	return NewCredentials(fmt.Sprintf("ASIA-%s-%d", key.RoleARN, nth), "secret of "+key.RoleARN, "token of "+key.RoleARN,
		now, now.Add(f.skew+key.Duration).Round(0)), nil
}

func (f *fakeSTS) issued() []call {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

func (f *fakeSTS) set(respond func(ctx context.Context, key Key, nth int) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.respond = respond
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
}

// start runs a cache in the current synctest bubble until the end of the test.
func start(t *testing.T, change func(*Options), live map[Key]bool) *rig {
	t.Helper()
	r := &rig{t: t, sts: &fakeSTS{t: t}, live: &liveSet{}, reg: prometheus.NewRegistry()}
	r.live.set(live)
	o := Options{
		Issuer: r.sts, Live: r.live.all, Metrics: r.reg,
		Encode: func(c Credentials) []byte { return []byte("document of " + c.AccessKeyID) },
	}
	if change != nil {
		change(&o)
	}
	r.Cache = New(o)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return r
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

func (r *rig) requests(result string) float64 {
	r.t.Helper()
	return r.metric("imdsgate_credentials_requests_total", result)
}

func (r *rig) metric(name, label string) float64 {
	r.t.Helper()
	families, err := r.reg.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if label == "" && len(m.GetLabel()) == 0 || len(m.GetLabel()) == 1 && m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return -1
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
		if c := r.Peek(&eager); c == nil {
			t.Error("a live pod's key was not prefetched")
		} else if got, want := string(c.Document()), "document of "+c.AccessKeyID; got != want {
			t.Errorf("document %q, want %q", got, want)
		}
		if r.Peek(&lazy) != nil || len(r.sts.issued()) != 1 {
			t.Error("issued for a pod that gets its credentials elsewhere")
		}
		r.mustGet(lazy, 450*time.Millisecond)
		time.Sleep(40 * time.Minute)
		synctest.Wait()
		if n := len(r.sts.issued()); n != 4 {
			t.Errorf("%d issues, want 2 for each key: what was asked for once is kept fresh", n)
		}
	})
}

func TestMetricsLint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, nil, map[Key]bool{testKey(1): true})
		synctest.Wait()
		if problems, err := testutil.GatherAndLint(r.reg); err != nil || len(problems) > 0 {
			t.Error(problems, err)
		}
	})
}
