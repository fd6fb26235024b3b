package growth

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

var shared *lab.Lab

func TestMain(m *testing.M) { os.Exit(run(m)) }

// run builds the daemon as the image has it: memory differs with what else a build has in it.
func run(m *testing.M) int {
	if os.Getenv("LAB_DAEMON") == "" {
		dir, err := os.MkdirTemp("", "growth-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		binary := filepath.Join(dir, "imdsgate")
		build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, "./cmd/imdsgate")
		build.Dir, build.Env = filepath.Join("..", ".."), append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build imdsgate: %v\n%s", err, out)
			return 1
		}
		os.Setenv("LAB_DAEMON", binary)
	}
	return labtest.Main(m, func(l *lab.Lab) { shared = l })
}

const mib = 1 << 20

// The bars of a daemon on a full node: 250 pods, each with a service account of its own.
const (
	fullNode       = 250
	maxRSS         = 32e6
	maxStartBytes  = 2 * mib // from the API server
	maxConnections = 14      // for 301 streams, of which the API server takes 100 on one
)

// node makes a node with so many pods, and what its daemon needs to issue their credentials.
func node(t testing.TB, pods int) (*lab.Node, *crowd) {
	t.Helper()
	n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true})
	if _, err := n.Role("growth"); err != nil {
		t.Fatal(err)
	}
	c := &crowd{kube: shared.Kube, node: n.Name, net: byte(n.Index)}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if err := c.populate(ctx, pods); err != nil {
		t.Fatal(err)
	}
	return n, c
}

// sample is what one daemon was measured to cost.
type sample struct {
	size           size
	pods           int // of the node
	Ready          time.Duration
	Watches        float64
	Connections    int64
	Sent, Received int64     // bytes at the start
	Memory         footprint // at rest
	Busy           footprint // at the end of the churn

	// Of a minute of churn: bytes, and what was done meanwhile.
	ChurnSent, ChurnReceived int64
	Replaced                 int
	Changed                  int64 // of other nodes' objects
}

// begin starts a daemon that ends with the test, waits until it has everybody's credentials and measures its start. STS's rate
// limit is not what is measured.
func begin(t testing.TB, n *lab.Node, c *crowd) (*subject, sample) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	before, err := observe(ctx, shared.Kube)
	if err != nil {
		t.Fatal(err)
	}
	s, err := launch(ctx, n, "-sts-rate", "100", "-cni-results", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.stop)
	if err := s.issued(ctx, c.has); err != nil {
		t.Fatal(err)
	}
	after, err := observe(ctx, shared.Kube)
	if err != nil {
		t.Fatal(err)
	}
	m := sample{
		pods: c.has, Ready: s.ready, Watches: after.Watches - before.Watches,
		Connections: s.relay.conns.Load(), Sent: s.relay.sent.Load(), Received: s.relay.received.Load(),
	}
	m.Memory, err = s.footprint(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return s, m
}

// settles waits until what only the start needed was given back, and fails if that leaves too much.
func settles(t testing.TB, s *subject, ceiling int64) (f footprint) {
	t.Helper()
	for end := time.Now().Add(25 * time.Second); ; { // before the pages of the program go
		var err error
		if f, err = s.footprint(t.Context()); err != nil {
			t.Fatal(err)
		}
		if f.RSS <= ceiling && f.RSS < f.Peak*9/10 {
			return f
		}
		if time.Now().After(end) {
			t.Errorf("%.1f MiB are resident, %.1f of them anonymous, want at most %.1f", float64(f.RSS)/mib, float64(f.Anonymous)/mib, float64(ceiling)/mib)
			return f
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// near fails unless b is at most 10 % more than a.
func near(t testing.TB, what string, a, b float64) {
	t.Helper()
	if b > a*1.1 {
		t.Errorf("%s: %.0f, and %.0f in a cluster of twenty times the size", what, a, b)
	}
}

// What a daemon costs does not depend on the size of the cluster, nor on what changes elsewhere in it.
func TestGrowthWithCluster(t *testing.T) {
	ctx := t.Context()
	c := &cluster{kube: shared.Kube}
	if err := c.grow(ctx, 100); err != nil {
		t.Fatal(err)
	}
	n, pods := node(t, 60)
	s, small := begin(t, n, pods)
	small.Memory = settles(t, s, maxRSS)
	s.stop()
	if err := c.grow(ctx, 2000); err != nil {
		t.Fatal(err)
	}
	s, large := begin(t, n, pods)
	large.Memory = settles(t, s, min(maxRSS, small.Memory.RSS*11/10)) // as near 10 % as everything else
	t.Logf("of a small and a large cluster:\n%+v\n%+v", small, large)

	// One for the node's pods, one for each service account and each namespace of theirs.
	if want := float64(1 + 60 + 12); small.Watches != want || large.Watches != want {
		t.Errorf("%v and %v watches, want %v", small.Watches, large.Watches, want)
	}
	near(t, "bytes from the API server at the start", float64(small.Received), float64(large.Received))
	near(t, "bytes to the API server at the start", float64(small.Sent), float64(large.Sent))

	quiet := s.relay.received.Load()
	var changed int64
	for changed < 50 { // on a machine as busy as it may be
		churn, cancel := context.WithTimeout(ctx, 4*time.Second)
		done, err := c.stir(churn, 50)
		cancel()
		if changed += done; err != nil {
			t.Fatalf("%d changes elsewhere: %v", changed, err)
		}
	}
	if got := s.relay.received.Load() - quiet; got > 8<<10+256*int64(large.Watches) { // a bookmark of each watch may come by
		t.Errorf("%d changes elsewhere in the cluster sent %d bytes here", changed, got)
	}
}

// A full node: memory, watches, connections and bytes.
func TestGrowthFullNode(t *testing.T) {
	n, pods := node(t, fullNode)
	s, m := begin(t, n, pods)
	m.Memory = settles(t, s, maxRSS)
	t.Logf("%+v", m)
	if want := float64(1 + fullNode + fullNode/5); m.Watches != want {
		t.Errorf("%v watches, want %v", m.Watches, want)
	}
	if m.Received > maxStartBytes || m.Connections > maxConnections {
		t.Errorf("the start took %d bytes and %d connections, want at most %d and %d", m.Received, m.Connections, maxStartBytes, maxConnections)
	}

	// A new pod of a service account that is followed already costs its own status alone, once it runs.
	before, quiet := s.relay.conns.Load(), s.relay.received.Load()
	replaced := 0
	for replaced < 5 { // on a machine as busy as it may be
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
		done, err := pods.churn(ctx, 200*time.Millisecond, replaced)
		cancel()
		if replaced += done; err != nil {
			t.Fatalf("%d pods replaced: %v", replaced, err)
		}
	}
	got := s.relay.received.Load() - quiet
	t.Logf("%d pods replaced: %d bytes", replaced, got)
	if got > int64(replaced+1)*30<<10 || s.relay.conns.Load() != before {
		t.Errorf("%d pods replaced: %d bytes, %d new connections", replaced, got, s.relay.conns.Load()-before)
	}

	// After a restart the same is asked for, and STS is not.
	s.stop()
	calls := len(n.AWS.Calls())
	s, again := begin(t, n, pods)
	near(t, "bytes at the second start", float64(m.Received), float64(again.Received))
	if now := len(n.AWS.Calls()); now != calls {
		t.Errorf("the restart cost %d STS calls", now-calls)
	}
	settles(t, s, maxRSS)
}
