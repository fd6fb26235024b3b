package cache

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/time/rate"
)

// A day of a node with 8 keys: at most 2.2 STS calls a key and hour with sessions of 1 h, also when the daemon is restarted and
// updated meanwhile. A restart costs no call by itself, and neither does an update, where two instances run for a while.
func TestCallsOfADay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 8
		dir := filepath.Join(t.TempDir(), "credentials")
		live := keys(n)
		r := kept(t, dir, live)
		synctest.Wait()
		calls := 0
		for hour := range 24 {
			time.Sleep(10 * time.Minute) // nothing is due within 27 minutes of the first issue; later anything may be at any time
			switch hour % 6 {
			case 0, 2:
				calls += len(r.sts.take())
				r.stop()
				r = kept(t, dir, live)
				synctest.Wait()
				if got := len(r.sts.issued()); got != 0 {
					t.Errorf("hour %d: a restart cost %d calls", hour, got)
				}
			case 4:
				next := kept(t, dir, live)
				time.Sleep(20 * time.Second) // both run; what falls due meanwhile is asked for by both
				synctest.Wait()
				calls += len(r.sts.take())
				r.stop()
				r = next
			}
			time.Sleep(50 * time.Minute)
			synctest.Wait()
		}
		calls += len(r.sts.take())
		perHour := float64(calls) / n / 24
		t.Logf("%d calls for %d keys in a day: %.3f a key and hour", calls, n, perHour)
		if perHour > 2.2 || perHour < 1.8 {
			t.Errorf("%.3f calls a key and hour, want 1.8 to 2.2", perHour)
		}
	})
}

// The DaemonSet is rolled out over every node: nobody asks STS for what the instance before had.
func TestRollOutOfEveryNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const nodes, n = 25, 10
		dirs, old := make([]string, nodes), make([]*rig, nodes)
		for i := range nodes {
			dirs[i] = filepath.Join(t.TempDir(), fmt.Sprint("node-", i), "credentials")
			old[i] = kept(t, dirs[i], keys(n))
		}
		time.Sleep(time.Second)
		synctest.Wait()
		calls := 0
		for i := range nodes { // 8 minutes: before anything is due
			next := kept(t, dirs[i], nil)
			time.Sleep(10 * time.Second) // until its pods are known
			next.live.set(keys(n))
			next.Wake()
			synctest.Wait()
			for key := range keys(n) {
				if next.Peek(&key, nil, time.Now()) == nil {
					t.Fatalf("node %d: nothing for %s", i, key.RoleARN)
				}
			}
			time.Sleep(9 * time.Second)
			old[i].stop()
			calls += len(next.sts.issued()) + len(old[i].sts.issued()) - n
		}
		if calls != 0 {
			t.Errorf("the roll-out over %d nodes cost %d calls", nodes, calls)
		}
	})
}

// account is the STS of one account and Region for many nodes: a request quota for all, a round trip, and the SDK's one retry.
type account struct {
	quota *rate.Limiter

	mu                  sync.Mutex
	requests, throttled int
}

var errThrottled = &IssueError{Code: "Throttling", Throttled: true, Err: errors.New("rate exceeded")}

func (a *account) Issue(ctx context.Context, key Key) (Credentials, error) {
	for attempt := range 2 {
		if attempt > 0 {
			time.Sleep(125*time.Millisecond + rand.N(125*time.Millisecond))
		}
		time.Sleep(50 * time.Millisecond)
		now := time.Now()
		ok := a.quota.AllowN(now, 1)
		a.mu.Lock()
		a.requests++
		if !ok {
			a.throttled++
		}
		a.mu.Unlock()
		if ok {
			return NewCredentials("ASIA", "secret", "token", now, now.Add(key.Duration)), nil
		}
	}
	return Credentials{}, errThrottled
}

// thunderNodes are the nodes of TestThunderingStart. For a whole cluster (half a minute):
//
//	go test ./cache -run TestThunderingStart -v -thunder-nodes 5000
var thunderNodes = flag.Int("thunder-nodes", 100, "nodes that start at once in TestThunderingStart")

// Every node of a cluster starts at the same moment, and its account's quota is a small part of what they may ask for together:
// 5,000 nodes at 10 a second against STS's 600 a second and account, or the same to scale. The quota is used, refused calls are
// few, and what a pod waits for goes before what is only fetched ahead: with every key for itself backing off, as it was, a pod
// waited for 9 minutes, and 19 requests were made for each session.
//
// STS: "600 requests per second, per account, per Region", AssumeRole among them:
// https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_iam-quotas.html
func TestThunderingStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := thunder(t, *thunderNodes, 30, float64(*thunderNodes)*600/5000)
		t.Log(f)
		if f.all > 2*f.least {
			t.Errorf("all have credentials after %v, want at most twice %v", f.all, f.least)
		}
		if f.askedHalf > 20*time.Second || f.askedAll > 2*time.Minute {
			t.Errorf("half of the pods that ask are served after %v, all after %v, want 20s and 2m", f.askedHalf, f.askedAll)
		}
		if f.perKey > 4 {
			t.Errorf("%.1f requests for each session, want at most 4", f.perKey)
		}
	})
}

// figures of a start.
type figures struct {
	nodes, keys             int
	quota                   float64
	least, half, all        time.Duration // by the quota alone; until half, all of the keys had credentials
	askedHalf, askedAll     time.Duration // until what pods asked for was there
	perKey, throttledPerKey float64       // requests of STS
}

func (f figures) String() string {
	return fmt.Sprintf("%d nodes with %d keys each, %v requests a second: %v at least; half of the keys after %v, all after %v; "+
		"keys that a pod asks for: half after %v, all after %v; %.1f requests a key, %.1f of them throttled",
		f.nodes, f.keys, f.quota, f.least.Round(time.Second), f.half.Round(time.Second), f.all.Round(time.Second),
		f.askedHalf.Round(time.Second), f.askedAll.Round(time.Second), f.perKey, f.throttledPerKey)
}

// thunder starts nodes in the current bubble, each with a pod that asks for one of its keys every second until it has it.
func thunder(t *testing.T, nodes, perNode int, quota float64) figures {
	f := figures{nodes: nodes, keys: perNode, quota: quota, least: time.Duration(float64(nodes*perNode) / quota * float64(time.Second))}
	sts := &account{quota: rate.NewLimiter(rate.Limit(quota), int(quota))}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	begun := time.Now()
	var (
		running, pods sync.WaitGroup
		mu            sync.Mutex
		asked, ready  []time.Duration
	)
	for range nodes {
		live := keys(perNode)
		c := New(Options{
			Issuer: sts, Live: func() iter.Seq2[Key, bool] { return maps.All(live) },
			Encode: func(Credentials) []byte {
				mu.Lock()
				defer mu.Unlock()
				ready = append(ready, time.Since(begun))
				return []byte("document")
			},
		})
		running.Go(func() { _ = c.Run(ctx) })
		pods.Go(func() {
			for key := testKey(rand.N(perNode)); ; time.Sleep(time.Second) {
				wait, stop := context.WithTimeout(ctx, 450*time.Millisecond)
				_, err := c.Get(wait, key)
				stop()
				if err == nil {
					break
				}
			}
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, time.Since(begun))
		})
	}
	pods.Wait()
	for done := false; !done; {
		time.Sleep(time.Second)
		mu.Lock()
		done = len(ready) >= nodes*perNode
		mu.Unlock()
	}
	cancel()
	running.Wait()
	slices.Sort(asked)
	slices.Sort(ready)
	f.half, f.all = ready[nodes*perNode/2-1], ready[nodes*perNode-1]
	f.askedHalf, f.askedAll = asked[nodes/2], asked[nodes-1]
	f.perKey = float64(sts.requests) / float64(len(ready))
	f.throttledPerKey = float64(sts.throttled) / float64(len(ready))
	return f
}
