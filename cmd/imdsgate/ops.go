package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/imdsgate/imdsgate/cmd/imdsgate/page"
	"github.com/imdsgate/imdsgate/proxy"
)

// serveOps starts the operator's listeners: ops, debug and the probe socket. Each is a server of its own; none shares the
// pod-facing port.
func (d *daemon) serveOps(ctx context.Context, task func(context.Context, string, func(context.Context) error)) {
	ops := d.opsHandler()
	serve := func(name, network, addr string, h http.Handler) {
		if addr == "" {
			return
		}
		task(ctx, "serve "+name, func(ctx context.Context) error { return d.serveHTTP(ctx, name, network, addr, h) })
	}
	serve("ops", "tcp", d.config.OpsAddr, ops)
	serve("debug", "tcp", d.config.DebugAddr, d.debugHandler())
	probes := http.NewServeMux()
	d.page.Register(probes) // what -check asks
	probes.Handle("GET /healthz", ops)
	probes.Handle("GET /readyz", ops)
	serve("probes", "unix", d.config.ProbeSocket, probes)
}

// More than anybody who may ask needs: a scrape, a few browsers.
const opsConnections, opsConnectionsPerIP = 64, 16

// serveHTTP serves until ctx is done. While the address is taken, by the instance that this one replaces, it tries again: the
// port is not worth an exit, pods are served without it.
func (d *daemon) serveHTTP(ctx context.Context, name, network, addr string, h http.Handler) error {
	l, err := d.bindOps(ctx, name, network, addr)
	if l == nil || err != nil {
		return err
	}
	if network == "tcp" { // pods reach the node's addresses too
		l = proxy.LimitListener(l, opsConnections, opsConnectionsPerIP)
	}
	s := opsServer(h)
	stopped := make(chan struct{})
	defer context.AfterFunc(ctx, func() {
		defer close(stopped)
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTime)
		defer cancel()
		_ = s.Shutdown(end)
	})()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-stopped
	return nil
}

// opsServer gives up on clients that do not read: three of them would be all the scrapes that there may be at a time.
func opsServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler: h, ReadTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 75 * time.Second, MaxHeaderBytes: 16 << 10,
	}
}

// bindOps returns nil without an error when there is no use in trying: then the reason is logged.
func (d *daemon) bindOps(ctx context.Context, name, network, addr string) (net.Listener, error) {
	if network == "unix" {
		if err := os.MkdirAll(filepath.Dir(addr), 0o700); err != nil {
			d.log.Warn("no probe socket: imdsgate -probe will fail; set -probe-socket to a file in a writable volume", "error", err.Error())
			<-ctx.Done()
			return nil, nil
		}
		_ = os.Remove(addr) // of an instance that was killed; the volume is this pod's own
	}
	var lc net.ListenConfig
	said := false
	for {
		l, err := lc.Listen(ctx, network, addr)
		if err == nil {
			d.log.Info("listening", "address", l.Addr().String(), "for", name)
			return l, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil, fmt.Errorf("listen: %w (set -%s-addr)", err, name)
		}
		if !said {
			said = true
			d.log.Warn("address taken, trying until it is free", "for", name, "address", addr, "error", err.Error())
		}
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(time.Second):
		}
	}
}

func (d *daemon) opsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.metrics, promhttp.HandlerOpts{Registry: d.metrics, MaxRequestsInFlight: 3}))
	mux.HandleFunc("GET /healthz", answer(d.healthy))
	mux.HandleFunc("GET /readyz", answer(d.ready))
	return mux
}

// answer is 200 ok or 503 with what is missing.
func answer(check func(context.Context) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if err := check(r.Context()); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, err)
			return
		}
		fmt.Fprintln(w, "ok")
	}
}

// healthy is liveness: our own request path answers. Never STS, the API server or the real endpoint: restarting would mend none
// of them, and kube2iam was killed for each of their hiccups.
func (d *daemon) healthy(ctx context.Context) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPut, "/latest/api/token", nil)
	if err != nil {
		return err
	}
	r.RequestURI, r.RemoteAddr = r.URL.Path, "127.0.0.1:1"
	r.Header.Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "1")
	code := make(chan int, 1)
	go func() {
		w := statusWriter{header: http.Header{}}
		d.server.Handler().ServeHTTP(&w, r)
		code <- w.status
	}()
	select {
	case c := <-code:
		if c != http.StatusOK {
			return fmt.Errorf("the token endpoint answers %d", c)
		}
		return nil
	case <-time.After(time.Second):
		return errors.New("the token endpoint does not answer")
	}
}

// statusWriter keeps the status of an answer alone.
type statusWriter struct {
	header http.Header
	status int
}

func (w *statusWriter) Header() http.Header { return w.header }

func (w *statusWriter) WriteHeader(status int) { w.status = status }

func (w *statusWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return len(b), nil
}

// ready: pods are known and the rules are whole.
func (d *daemon) ready(context.Context) error {
	var errs []error
	if !d.pods.Synced() {
		errs = append(errs, errors.New("the pods of this node are not known yet"))
	}
	select {
	case <-d.redirected:
	default:
		errs = append(errs, errors.New("pods are not sent here yet"))
	}
	if d.config.Redirect != "none" || d.config.Guard {
		errs = append(errs, d.rules.Verified())
	}
	return errors.Join(errs...)
}

// debugHandler shows what the daemon decided, never a secret.
func (d *daemon) debugHandler() http.Handler {
	mux := http.NewServeMux()
	d.page.Register(mux)
	if d.config.Pprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return page.Local(d.config.DebugAddr, mux)
}

// probe asks the running instance over its socket.
func probe(ctx context.Context, c *Config, stdout io.Writer) error {
	path := "/readyz"
	switch {
	case len(c.Args) == 1 && c.Args[0] == "health":
		path = "/healthz"
	case len(c.Args) > 1 || len(c.Args) == 1 && c.Args[0] != "ready":
		return usageError{fmt.Errorf("-probe takes health or ready, not %q", c.Args)}
	}
	body, status, err := askSocket(ctx, c.ProbeSocket, path, 4<<10)
	if err != nil {
		return err
	}
	if _, err := stdout.Write(body); err != nil {
		return fmt.Errorf("tell the answer: %w", err)
	}
	if status != http.StatusOK {
		return errFindings
	}
	return nil
}
