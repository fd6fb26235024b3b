package growth

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/bench/report"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

const (
	manyDaemons  = 50
	manyKubelets = 20 // they compute more than the API server does for them: as many as a small machine can take
	podsEach     = 30
	quietTime    = time.Minute // a watch gets its bookmarks once a minute
	// meanWatch is how long a watch of a daemon, and of a kubelet, is open: 5 to 10 minutes, the choice of client-go's
	// reflectors, and of the daemon's own in proxy/pods.
	meanWatch = 7*time.Minute + 30*time.Second
)

// cost is what a number of clients cost the API server: at their start, and in a minute afterwards in which nothing happens.
type cost struct {
	clients                int
	ready                  time.Duration // until the last of them was
	start, quiet           apiServer     // what changed meanwhile
	startBytes, quietBytes int64         // to the clients
}

// BenchmarkDaemons starts 50 daemons at once against one API server, and then 20 kubelets with the pods of as many of their
// nodes. What the API server does for nobody is measured before, between and after, in the same way and for as long.
func BenchmarkDaemons(b *testing.B) {
	kubemark := buildKubemark(b)
	nodes := make([]*lab.Node, manyDaemons)
	for i := range nodes {
		nodes[i], _ = node(b, podsEach)
	}
	hollow := make([]*lab.Node, manyKubelets)
	for i := range hollow {
		hollow[i] = kubeletNode(b)
	}
	idle := []apiServer{quiet(b)}
	daemons := measure(b, manyDaemons, func(ctx context.Context, i int) (*relay, func(), error) {
		s, err := launch(ctx, nodes[i], "-cni-results", "")
		if err != nil {
			return nil, nil, err
		}
		return s.relay, s.stop, s.issued(ctx, podsEach)
	})
	idle = append(idle, quiet(b))
	kubelets := measure(b, manyKubelets, func(ctx context.Context, i int) (*relay, func(), error) {
		return startKubelet(ctx, hollow[i], kubemark)
	})
	idle = append(idle, quiet(b))
	if err := report.Add(reportDir, daemonsSection(daemons, kubelets, idle)); err != nil {
		b.Fatal(err)
	}
}

func look(b *testing.B) apiServer {
	b.Helper()
	a, err := observe(b.Context(), shared.Kube)
	if err != nil {
		b.Fatal(err)
	}
	return a
}

// quiet is what the API server does in quietTime when nobody asks for anything.
func quiet(b *testing.B) apiServer {
	b.Helper()
	time.Sleep(5 * time.Second) // what was done before is digested
	before := look(b)
	time.Sleep(quietTime)
	did := look(b).since(before)
	b.Logf("idle: %+v", did)
	return did
}

// measure starts clients at once, lets them be for quietTime, and ends them.
func measure(b *testing.B, clients int, start func(context.Context, int) (*relay, func(), error)) cost {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), 5*time.Minute)
	defer cancel()
	relays, stops := make([]*relay, clients), make([]func(), clients)
	stop := sync.OnceFunc(func() {
		for _, stop := range stops {
			if stop != nil {
				stop()
			}
		}
	})
	defer stop()
	received := func() (n int64) {
		for _, r := range relays {
			n += r.received.Load()
		}
		return n
	}
	before, begun := look(b), time.Now()
	var g errgroup.Group
	for i := range clients {
		g.Go(func() (err error) {
			relays[i], stops[i], err = start(ctx, i)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
	c := cost{clients: clients, ready: time.Since(begun), startBytes: received()}
	started := look(b)
	time.Sleep(quietTime)
	c.quietBytes = received() - c.startBytes
	c.start, c.quiet = started.since(before), look(b).since(started)
	if math.Abs(c.quiet.All) >= c.start.All/float64(clients) { // some of the API server's own come and go
		b.Fatalf("%+.0f watches in a minute in which nothing happens: a client ended, or had not started", c.quiet.All)
	}
	b.Logf("%+v", c)
	stop()
	for look(b).All > before.All {
		select {
		case <-ctx.Done():
			b.Fatalf("the API server still has %.0f watches of clients that ended", look(b).All-before.All)
		case <-time.After(time.Second):
		}
	}
	return c
}

// kubeletNode makes a node with so many pods, and what a kubelet needs to run them.
func kubeletNode(b *testing.B) *lab.Node {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), 2*time.Minute)
	defer cancel()
	n := labtest.Node(b, shared, lab.NodeOptions{IPv4Only: true})
	// The Node is there before its kubelet, which would refuse every pod for lack of room.
	room := []byte(`{"status":{"capacity":{"pods":"110","cpu":"4","memory":"16Gi"},"allocatable":{"pods":"110","cpu":"4","memory":"16Gi"}}}`)
	if _, err := shared.Kube.CoreV1().Nodes().PatchStatus(ctx, n.Name, room); err != nil {
		b.Fatal(err)
	}
	everything := []rbacv1.PolicyRule{{APIGroups: []string{"*"}, Resources: []string{"*"}, Verbs: []string{"*"}}}
	if err := n.SetPermissions(ctx, everything); err != nil {
		b.Fatal(err)
	}
	c := &crowd{kube: shared.Kube, node: n.Name, net: byte(n.Index), cas: true}
	if err := c.populate(ctx, podsEach); err != nil {
		b.Fatal(err)
	}
	if err := createAuthorities(ctx, shared.Kube, "imdsgate"); err != nil { // where the lab has each node's daemon's pod
		b.Fatal(err)
	}
	return n
}

// running is an error unless the node's kubelet has started every pod: one that refuses them costs the API server less.
func running(ctx context.Context, n *lab.Node) error {
	pods, err := shared.Kube.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + n.Name})
	if err != nil {
		return err
	}
	if len(pods.Items) < podsEach {
		return fmt.Errorf("%s has %d pods, want %d at least", n.Name, len(pods.Items), podsEach)
	}
	for _, p := range pods.Items {
		if s := p.Status; s.Phase != corev1.PodRunning || len(s.ContainerStatuses) != 1 || s.ContainerStatuses[0].ContainerID == containerID {
			return fmt.Errorf("the kubelet of %s does not run %s: %s %s %s", n.Name, p.Name, s.Phase, s.Reason, s.Message)
		}
	}
	return nil
}

// hollowRoot is the root directory that kubemark makes, says in its log, and leaves behind.
var hollowRoot = regexp.MustCompile(`/tmp/hollow-kubelet\.\d+`)

// startKubelet runs the kubelet's own code with a container runtime that pretends (kubemark).
func startKubelet(ctx context.Context, n *lab.Node, kubemark string) (*relay, func(), error) {
	r, kubeconfig, err := startRelay(ctx, n)
	if err != nil {
		return nil, nil, err
	}
	run, end := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() {
		out, err := n.Run(run, kubemark, "--morph=kubelet", "--name="+n.Name, "--kubeconfig="+kubeconfig, "--use-host-image-service=false",
			"--kubelet-port=10250", "--kubelet-read-only-port=0", "--cert-dir="+n.Dir(), "--v=1")
		if root := hollowRoot.FindString(out); root != "" {
			os.RemoveAll(root)
		}
		ended <- fmt.Errorf("kubemark ended: %w: %.2000s", err, out[max(0, len(out)-2000):])
	}()
	stop := func() {
		end()
		<-ended
		r.close()
	}
	// It has started when it runs its pods and watches nothing new for some time: it says so nowhere.
	var lacks error
	for last, quiet := r.received.Load(), time.Now(); ; {
		select {
		case err := <-ended:
			ended <- err
			return r, stop, err
		case <-ctx.Done():
			return r, stop, errors.Join(ctx.Err(), lacks)
		case <-time.After(time.Second):
		}
		if now := r.received.Load(); now-last > 5<<10 || now == 0 {
			quiet = time.Now()
			last = now
		}
		if time.Since(quiet) < 10*time.Second {
			continue
		}
		if lacks = running(ctx, n); lacks == nil {
			return r, stop, nil
		}
		quiet = time.Now()
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

func daemonsSection(daemons, kubelets cost, idle []apiServer) report.Section {
	const cluster = 5000
	cpu := func(a apiServer) float64 { return a.CPU }
	share := func(c cost) float64 { return c.ready.Seconds() / quietTime.Seconds() }
	row := func(what string, digits int, of func(cost) estimate) []string {
		cells := []string{what}
		for _, n := range []struct {
			of     float64
			digits int
		}{{1, digits}, {cluster, 0}} {
			for _, c := range []cost{daemons, kubelets} {
				cells = append(cells, of(c).times(n.of/float64(c.clients)).text(n.digits))
			}
		}
		return cells
	}
	counted := func(of func(cost) float64) func(cost) estimate {
		return func(c cost) estimate { return estimate{value: of(c)} }
	}
	started := func(of func(apiServer) float64) func(cost) estimate {
		return func(c cost) estimate { return above(of(c.start), each(idle, of), share(c)) }
	}
	rested := func(of func(apiServer) float64) func(cost) estimate {
		return func(c cost) estimate { return above(of(c.quiet), each(idle, of), 1) }
	}
	idleCPU := each(idle, cpu)
	return report.Section{
		ID: "api-server", Title: "What daemons cost the API server, next to kubelets",
		Text: strings.Join([]string{
			fmt.Sprintf("%d daemons start at the same moment against one kube-apiserver, each on a node with %d pods of as many service accounts in %d namespaces; "+
				"the last was ready, with every session issued at the default -sts-rate, after %v. Then a minute in which nothing happens. Then the same with %d kubelets, the daemons gone, on "+
				"nodes with as many pods, and the daemon's: the kubelet's own code with a container runtime that pretends (kubemark's hollow node), from its start until it asked for nothing new; "+
				"its pods have a token and the cluster's authorities mounted, as all have, and no other ConfigMap or Secret. The figures are those of all, divided by how many they are.",
				daemons.clients, podsEach, podsEach/5, daemons.ready.Round(time.Second), kubelets.clients),
			fmt.Sprintf("CPU is the API server's process_cpu_seconds_total and requests are its apiserver_request_total, less what both are when nobody asks, in %d minutes before, between and after: "+
				"%.2f to %.2f s, and %.0f to %.0f requests. How far these minutes are from each other is the ±, and a figure that is not larger is none. Bytes are counted by a relay on each client's connections.",
				len(idle), slices.Min(idleCPU), slices.Max(idleCPU),
				slices.Min(each(idle, apiServer.requests)), slices.Max(each(idle, apiServer.requests))),
			fmt.Sprintf("What one asks for in the quiet minute: a daemon %s; a kubelet %s. At the start: a daemon %s; a kubelet %s. No watch is old enough in that minute to be asked for again; "+
				"later each is every 5 to 10 minutes, of daemons as of kubelets, which the last row has: the watches, divided by %.1f minutes.",
				kinds(daemons.quiet, daemons.clients, idle, 1), kinds(kubelets.quiet, kubelets.clients, idle, 1),
				kinds(daemons.start, daemons.clients, idle, share(daemons)), kinds(kubelets.start, kubelets.clients, idle, share(kubelets)), meanWatch.Minutes()),
			fmt.Sprintf("The figures for %d nodes are those of one, multiplied: an API server of that size has other proportions (more of everything at once, shared encodings). "+
				"They say how a daemon compares with the kubelet beside it, and no more.", cluster),
			"    cd e2e && go test ./growth -run '^$' -bench Daemons -benchtime 1x",
		}, "\n\n"),
		Tables: []report.Table{{
			Head: []string{"", "one daemon", "one kubelet", "5,000 daemons, extrapolated", "5,000 kubelets, extrapolated"},
			Rows: [][]string{
				row("watches", 0, counted(func(c cost) float64 { return c.start.All })),
				row("start: requests", 0, started(apiServer.requests)),
				row("start: CPU of the API server, s", 3, started(cpu)),
				row("start: kB from the API server", 0, counted(func(c cost) float64 { return float64(c.startBytes) / 1e3 })),
				row("a quiet minute: requests", 1, rested(apiServer.requests)),
				row("a quiet minute: CPU of the API server, s", 3, rested(cpu)),
				row("a quiet minute: kB from the API server", 1, counted(func(c cost) float64 { return float64(c.quietBytes) / 1e3 })),
				row("later, a minute: watches asked for again, computed", 1, counted(func(c cost) float64 { return c.start.All / meanWatch.Minutes() })),
			},
		}},
	}
}
