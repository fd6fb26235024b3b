package growth

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"k8s.io/client-go/kubernetes"

	"github.com/imdsgate/imdsgate/e2e/lab"
)

// subject is one daemon under test, with the relay that counts its bytes.
type subject struct {
	daemon *lab.Daemon
	relay  *relay
	ready  time.Duration // from its start
}

// launch starts a daemon behind a relay and waits until it is ready.
func launch(ctx context.Context, n *lab.Node, flags ...string) (_ *subject, err error) {
	r, kubeconfig, err := startRelay(ctx, n)
	if err != nil {
		return nil, err
	}
	s := &subject{relay: r}
	defer func() {
		if err != nil {
			s.stop()
		}
	}()
	start := time.Now()
	if s.daemon, err = n.LaunchDaemon(ctx, lab.DaemonOptions{Flags: append([]string{"-kubeconfig", kubeconfig}, flags...)}); err != nil {
		return nil, err
	}
	err = s.daemon.WaitReady(ctx)
	s.ready = time.Since(start)
	return s, err
}

func (s *subject) stop() {
	if s.daemon != nil {
		s.daemon.Kill()
	}
	s.relay.close()
}

// issued waits until the daemon has the credentials of so many keys.
func (s *subject) issued(ctx context.Context, keys int) error {
	for {
		m, err := s.daemon.Metrics(ctx)
		if err != nil {
			return err
		}
		if int(m[`imdsgate_credentials_entries{state="ready"}`]) == keys {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%v of %d keys have credentials: %w:\n%s", m[`imdsgate_credentials_entries{state="ready"}`], keys, ctx.Err(), s.daemon.Log().Tail(5))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// footprint is what a process holds, in bytes but for goroutines.
type footprint struct {
	RSS, Anonymous, Peak, Heap, Goroutines int64
}

func (s *subject) footprint(ctx context.Context) (f footprint, err error) {
	m, err := s.daemon.Metrics(ctx)
	if err != nil {
		return f, err
	}
	f.Heap, f.Goroutines = int64(m["go_memstats_heap_inuse_bytes"]), int64(m["go_goroutines"])
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.daemon.PID()))
	if err != nil {
		return f, err
	}
	for name, to := range map[string]*int64{"VmRSS": &f.RSS, "RssAnon": &f.Anonymous, "VmHWM": &f.Peak} {
		_, rest, ok := strings.Cut(string(status), "\n"+name+":")
		if _, err := fmt.Sscanf(rest, "%d kB", to); !ok || err != nil {
			return f, fmt.Errorf("no %s in /proc/PID/status: %w", name, err)
		}
		*to <<= 10
	}
	return f, nil
}

// apiServer is what the API server says of itself, or what changed of that in some time.
type apiServer struct {
	Watches float64 // open, of pods, service accounts and namespaces
	All     float64 // open watches of any kind
	CPU     float64 // seconds
	// Requests is what it was asked so far, as "PUT leases" or "WATCH pods", watches that are still open included.
	Requests map[string]float64
}

func (a apiServer) since(before apiServer) apiServer {
	d := apiServer{Watches: a.Watches - before.Watches, All: a.All - before.All, CPU: a.CPU - before.CPU, Requests: map[string]float64{}}
	for kind, n := range a.Requests {
		if n != before.Requests[kind] {
			d.Requests[kind] = n - before.Requests[kind]
		}
	}
	return d
}

func (a apiServer) requests() (n float64) {
	for _, of := range a.Requests {
		n += of
	}
	return n
}

func observe(ctx context.Context, kube kubernetes.Interface) (apiServer, error) {
	text, err := kube.CoreV1().RESTClient().Get().AbsPath("/metrics").Do(ctx).Raw()
	if err != nil {
		return apiServer{}, fmt.Errorf("ask the API server for its metrics: %w", err)
	}
	return parse(text)
}

func parse(metrics []byte) (apiServer, error) {
	a := apiServer{Requests: map[string]float64{}}
	lines := bufio.NewScanner(bytes.NewReader(metrics))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		sample, number, ok := strings.Cut(lines.Text(), "} ")
		if !ok {
			sample, number, _ = strings.Cut(lines.Text(), " ")
		}
		v, err := strconv.ParseFloat(number, 64)
		if err != nil {
			continue
		}
		name, labels, _ := strings.Cut(sample, "{")
		switch name {
		case "process_cpu_seconds_total":
			a.CPU = v
		case "apiserver_longrunning_requests":
			if label(labels, "verb") != "WATCH" {
				break
			}
			a.All += v
			a.Requests[kind(labels)] += v // apiserver_request_total has a watch once it ended
			if followed(labels) {
				a.Watches += v
			}
		case "apiserver_request_total":
			a.Requests[kind(labels)] += v
		}
	}
	return a, lines.Err()
}

// kind is a request's verb and what it is for.
func kind(labels string) string {
	what := label(labels, "resource")
	if sub := label(labels, "subresource"); what == "" {
		what = sub // a path
	} else if sub != "" {
		what += "/" + sub
	}
	return label(labels, "verb") + " " + what
}

// followed says whether labels are those of a kind of object that daemons follow.
func followed(labels string) bool {
	switch label(labels, "resource") {
	case "pods", "serviceaccounts", "namespaces":
		return true
	}
	return false
}

func label(labels, name string) string {
	_, rest, _ := strings.Cut(labels, name+`="`)
	value, _, _ := strings.Cut(rest, `"`)
	return value
}
