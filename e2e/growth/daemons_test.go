package growth

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	rbacv1 "k8s.io/api/rbac/v1"

	"github.com/imdsgate/imdsgate/e2e/bench/report"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

const (
	manyDaemons = 50
	podsEach    = 30
	idleTime    = time.Minute
)

// cost is what a number of clients cost the API server: at their start, and in a minute afterwards in which nothing happens.
type cost struct {
	clients                     int
	ready                       time.Duration // until the last of them was
	watches                     float64
	startCPU, idleCPU           float64 // seconds of the API server
	startRequests, idleRequests float64
	startBytes, idleBytes       int64 // to the clients
}

// BenchmarkDaemons starts 50 daemons at once against one API server, and then one kubelet with the pods of one of their nodes.
func BenchmarkDaemons(b *testing.B) {
	kubemark := buildKubemark(b)
	nodes := make([]*lab.Node, manyDaemons)
	for i := range nodes {
		nodes[i], _ = node(b, podsEach)
	}
	start := startKubelet(b, kubemark)
	idle := idleCPU(b)
	daemons := measure(b, manyDaemons, idle, func(ctx context.Context, i int) (*relay, func(), error) {
		s, err := launch(ctx, nodes[i], "-cni-results", "")
		if err != nil {
			return nil, nil, err
		}
		return s.relay, s.stop, s.issued(ctx, podsEach)
	})
	kubelet := measure(b, 1, idle, start)
	if err := report.Add(reportDir, daemonsSection(daemons, kubelet)); err != nil {
		b.Fatal(err)
	}
}

// idleCPU is what the API server computes in idleTime when nobody asks for anything.
func idleCPU(b *testing.B) float64 {
	time.Sleep(5 * time.Second) // what was made before is digested
	before, err := observe(b.Context(), shared.Kube)
	if err != nil {
		b.Fatal(err)
	}
	time.Sleep(idleTime / 3)
	after, err := observe(b.Context(), shared.Kube)
	if err != nil {
		b.Fatal(err)
	}
	return 3 * (after.CPU - before.CPU)
}

func measure(b *testing.B, clients int, idle float64, start func(context.Context, int) (*relay, func(), error)) cost {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), 5*time.Minute)
	defer cancel()
	at := func() apiServer {
		a, err := observe(ctx, shared.Kube)
		if err != nil {
			b.Fatal(err)
		}
		return a
	}
	relays := make([]*relay, clients)
	received := func() (n int64) {
		for _, r := range relays {
			n += r.received.Load()
		}
		return n
	}
	before, begun := at(), time.Now()
	var g errgroup.Group
	for i := range clients {
		g.Go(func() error {
			r, stop, err := start(ctx, i)
			if stop != nil {
				b.Cleanup(stop)
			}
			relays[i] = r
			return err
		})
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
	c := cost{clients: clients, ready: time.Since(begun), startBytes: received()}
	started := at()
	time.Sleep(idleTime)
	c.idleBytes = received() - c.startBytes
	after := at()
	c.watches = after.All - before.All
	c.startCPU = started.CPU - before.CPU - idle*c.ready.Seconds()/idleTime.Seconds()
	c.startRequests = started.Requests - before.Requests + started.All - before.All // watches are counted when they end
	c.idleCPU, c.idleRequests = after.CPU-started.CPU-idle, after.Requests-started.Requests
	b.Logf("%+v", c)
	return c
}

// startKubelet runs the kubelet's own code with a container runtime that pretends (kubemark), on a node with as many pods.
func startKubelet(b *testing.B, kubemark string) func(context.Context, int) (*relay, func(), error) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), 2*time.Minute)
	defer cancel()
	n := labtest.Node(b, shared, lab.NodeOptions{IPv4Only: true})
	everything := []rbacv1.PolicyRule{{APIGroups: []string{"*"}, Resources: []string{"*"}, Verbs: []string{"*"}}}
	if err := n.SetPermissions(ctx, everything); err != nil {
		b.Fatal(err)
	}
	c := &crowd{kube: shared.Kube, node: n.Name, net: byte(n.Index), cas: true}
	if err := c.populate(ctx, podsEach); err != nil {
		b.Fatal(err)
	}
	return func(ctx context.Context, _ int) (*relay, func(), error) {
		r, kubeconfig, err := startRelay(ctx, n)
		if err != nil {
			return nil, nil, err
		}
		run, end := context.WithCancel(context.WithoutCancel(ctx))
		ended := make(chan error, 1)
		go func() {
			out, err := n.Run(run, kubemark, "--morph=kubelet", "--name="+n.Name, "--kubeconfig="+kubeconfig, "--use-host-image-service=false",
				"--kubelet-port=10250", "--kubelet-read-only-port=0", "--cert-dir="+n.Dir(), "--v=1")
			ended <- fmt.Errorf("kubemark ended: %w: %.2000s", err, out[max(0, len(out)-2000):])
		}()
		stop := func() {
			end()
			<-ended
			r.close()
		}
		// It has started when it watches nothing new for some time: it says so nowhere.
		for last, quiet := r.received.Load(), time.Now(); time.Since(quiet) < 10*time.Second; {
			select {
			case err := <-ended:
				ended <- err
				return r, stop, err
			case <-time.After(time.Second):
			}
			if now := r.received.Load(); now-last > 5<<10 || now == 0 {
				quiet = time.Now()
				last = now
			}
		}
		return r, stop, nil
	}
}

func buildKubemark(b *testing.B) string {
	b.Helper()
	if out, err := exec.CommandContext(b.Context(), filepath.Join("..", "cluster", "bins", "build.sh"), "kubemark").CombinedOutput(); err != nil {
		b.Fatalf("build kubemark: %v\n%s", err, out)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		b.Fatal(err)
	}
	return filepath.Join(cache, "imdsgate-e2e", "bin", "kubemark")
}

func daemonsSection(daemons, kubelet cost) report.Section {
	const cluster = 5000
	row := func(what string, of func(cost) float64, format string) []string {
		d, k := of(daemons)/float64(daemons.clients), of(kubelet)
		return []string{what, fmt.Sprintf(format, d), fmt.Sprintf(format, k), fmt.Sprintf(format, d*cluster), fmt.Sprintf(format, k*cluster)}
	}
	return report.Section{
		ID: "api-server", Title: "What daemons cost the API server, next to kubelets",
		Text: strings.Join([]string{
			fmt.Sprintf("%d daemons start at the same moment against one kube-apiserver, each on a node with %d pods of as many service accounts in %d namespaces; "+
				"the last was ready, with every session issued at the default -sts-rate, after %v. Then a minute in which nothing happens. The kubelet is the kubelet's own code with a "+
				"container runtime that pretends (kubemark's hollow node), with as many pods, alone, from its start until it asked for nothing new; it mounts nothing, so the watches "+
				"of a real one for each ConfigMap and Secret of its pods are not among them. CPU is the API server's "+
				"process_cpu_seconds_total, less what it computes when nobody asks; bytes are counted by a relay on each client's connections.",
				daemons.clients, podsEach, podsEach/5, daemons.ready.Round(time.Second)),
			fmt.Sprintf("The figures for %d nodes are those of one, multiplied: an API server of that size has other proportions (more of everything at once, shared encodings). "+
				"They say how a daemon compares with the kubelet beside it, and no more.", cluster),
			"    cd e2e && go test ./growth -run '^$' -bench Daemons -benchtime 1x",
		}, "\n\n"),
		Tables: []report.Table{{
			Head: []string{"", "one daemon", "one kubelet", "5,000 daemons, extrapolated", "5,000 kubelets, extrapolated"},
			Rows: [][]string{
				row("watches", func(c cost) float64 { return c.watches }, "%.0f"),
				row("start: requests", func(c cost) float64 { return c.startRequests }, "%.0f"),
				row("start: CPU of the API server, s", func(c cost) float64 { return c.startCPU }, "%.2f"),
				row("start: kB from the API server", func(c cost) float64 { return float64(c.startBytes) / 1e3 }, "%.0f"),
				row("a quiet minute: requests", func(c cost) float64 { return c.idleRequests }, "%.1f"),
				row("a quiet minute: CPU of the API server, s", func(c cost) float64 { return c.idleCPU }, "%.3f"),
				row("a quiet minute: kB from the API server", func(c cost) float64 { return float64(c.idleBytes) / 1e3 }, "%.1f"),
			},
		}},
	}
}
