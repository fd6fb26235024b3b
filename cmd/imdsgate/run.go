package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/imdsgate/imdsgate/cache"
	"github.com/imdsgate/imdsgate/cache/sts"
	"github.com/imdsgate/imdsgate/cmd/imdsgate/page"
	"github.com/imdsgate/imdsgate/iptables"
	"github.com/imdsgate/imdsgate/proxy"
	"github.com/imdsgate/imdsgate/proxy/pods"
)

// errFindings ends -check and -probe with exit code 1: what is wrong has been printed.
var errFindings = errors.New("findings")

// usageError ends with exit code 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// exitCode prints err, unless it has been said already, and maps it: 0 done, 1 failed, 2 wrong usage.
func exitCode(err error, stderr io.Writer) int {
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	case errors.Is(err, errFindings):
		return 1
	}
	fmt.Fprintln(stderr, "imdsgate:", err)
	if errors.As(err, new(usageError)) {
		return 2
	}
	return 1
}

// run is the whole program. It is the only place where the parts are joined.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	return app{stdout: stdout, stderr: stderr, closeEndpoint: closeEndpoint}.run(ctx, args, getenv)
}

// app holds what tests replace: a unit test must not touch the routing rules of the machine it runs on.
type app struct {
	stdout, stderr io.Writer
	closeEndpoint  func(ctx context.Context, c *Config, log *slog.Logger) error
}

func (a app) run(ctx context.Context, args []string, getenv func(string) string) error {
	c, err := parseConfig(args, getenv, a.stdout)
	if errors.Is(err, flag.ErrHelp) {
		return err
	}
	if err != nil && asksOneShot(args) { // who asks what is wrong, or cleans up, must not find the node closed by a typing error
		return usageError{err}
	}
	switch {
	case c.Version:
		fmt.Fprintln(a.stdout, "imdsgate", version())
		return nil
	case c.Probe:
		return probe(ctx, c, a.stdout)
	case c.Cleanup:
		return cleanup(ctx, c, a.stdout, newLogger(c, a.stderr))
	case c.Check:
		return a.check(ctx, c, args, getenv)
	case c.GuardOnly && !c.Guard:
		return usageError{errors.New("-guard-only has nothing to do with -guard=false: leave one of them out")}
	}
	lines := newLineQueue()
	defer lines.start(ctx, a.stderr, slog.New(newHandler(c, a.stderr)))()
	log := newLogger(c, lines)
	if c.GuardOnly { // needs to know neither the node nor its address
		if err := a.closeEndpoint(ctx, c, log); err != nil {
			return err
		}
		if err != nil {
			return usageError{err}
		}
		return nil
	}
	err = errors.Join(err, c.Validate())
	// Before anything that can fail: a node whose daemon cannot start must refuse its pods the real endpoint, so even a wrong
	// flag closes it. Nothing but -cleanup opens it again.
	if gerr := a.closeEndpoint(ctx, c, log); gerr != nil {
		return errors.Join(err, gerr)
	}
	if err != nil {
		return usageError{err}
	}
	return serve(ctx, c, log)
}

// closeEndpoint installs the guard.
func closeEndpoint(ctx context.Context, c *Config, log *slog.Logger) error {
	if !c.Guard {
		return nil
	}
	rules, err := iptables.New(c.rules(log, prometheus.NewRegistry()))
	if err != nil {
		return err
	}
	return rules.EnsureGuard(ctx)
}

func (c *Config) rules(log *slog.Logger, metrics prometheus.Registerer) iptables.Options {
	return iptables.Options{
		Guard: c.Guard, GuardPriority: c.GuardPriority, Interface: c.Interface, StateDir: c.StateDir,
		Log: log, Metrics: metrics,
	}
}

// daemon is the object graph of one serving instance.
type daemon struct {
	config  *Config
	log     *slog.Logger
	metrics *prometheus.Registry
	rules   *iptables.Rules
	pods    *pods.Pods
	cache   *cache.Cache
	server  *proxy.Server
	page    *page.Page
	started time.Time
	seen    seenRules
	nodeErr atomic.Pointer[error] // of the last look at the node's name; nil: none yet
	// redirected is closed once pods are sent here. A second instance is not ready before: the first would be ended too soon.
	redirected chan struct{}
}

func newDaemon(ctx context.Context, c *Config, log *slog.Logger) (*daemon, error) {
	d := &daemon{config: c, log: log, metrics: newRegistry(), started: time.Now(), redirected: make(chan struct{})}
	var err error
	if d.rules, err = iptables.New(c.rules(log, d.metrics)); err != nil {
		return nil, err
	}
	tokenKey, err := proxy.LoadTokenKey(c.StateDir)
	if err != nil {
		return nil, fmt.Errorf("load the session token key: %w (-state-dir)", err)
	}
	kube, err := pods.LoadConfig(c.Kubeconfig)
	if err != nil {
		return nil, err
	}
	policy := c.Policy
	issuer, err := newIssuer(ctx, c, &policy, func(ctx context.Context, namespace, serviceAccount, audience string) (string, error) {
		return d.pods.Token(ctx, namespace, serviceAccount, audience)
	}, log, d.metrics)
	if err != nil {
		return nil, err
	}
	d.pods, err = pods.New(pods.Options{
		Config: kube, Node: c.Node, Policy: &policy, Log: log, Metrics: d.metrics, CNIResults: c.CNIResults,
		OnChange: func(namespace, serviceAccount string) {
			d.cache.Retry(namespace, serviceAccount)
			d.cache.Wake()
		},
		OnMove: func(ip netip.Addr, uid string) { d.server.Moved(ip, uid) },
	})
	if err != nil {
		return nil, err
	}
	kept := ""
	if c.StateDir != "" {
		kept = filepath.Join(c.StateDir, "credentials")
	}
	d.cache = cache.New(cache.Options{
		Issuer: issuer, Live: d.pods.Live, Encode: proxy.Encode, Rate: c.STSRate, Dir: kept, Log: log, Metrics: d.metrics,
	})
	if err := d.cache.Restore(); err != nil {
		return nil, fmt.Errorf("%w (-state-dir)", err)
	}
	d.page = page.New(d)
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		return nil, fmt.Errorf("limit of open files: %w", err)
	}
	connections := podConnections(files.Cur)
	d.server, err = proxy.NewServer(proxy.Options{
		Callers: d.pods, Credentials: d.cache, Reports: d.pods, TokenKey: tokenKey, IMDSv1: c.IMDSv1,
		Hold: c.IdentifyTimeout, MetadataAddr: c.MetadataAddr, Allow: c.Allow, Log: log, Metrics: d.metrics,
		MaxConnections: connections, MaxConnectionsPerIP: max(1, connections/4),
	})
	return d, err
}

// podConnections is how many connections pods may have, given how many files may be open: at most half of them, or a pod that opens
// connections would keep the daemon from everything else, and the other pods out.
func podConnections(files uint64) int {
	return int(max(1, min(files/2, proxy.DefaultMaxConnections)))
}

// newIssuer makes the issuer and completes the policy with what only the node knows.
func newIssuer(ctx context.Context, c *Config, policy *proxy.Policy, token tokenFunc, log *slog.Logger, metrics prometheus.Registerer) (*sts.STS, error) {
	issuer, err := sts.New(ctx, sts.Options{
		WebIdentity: policy.Issuer == proxy.IssuerWebIdentity, Tokens: token,
		IntermediateRoleARN: c.IntermediateRoleARN, NodeSessionName: "imdsgate@" + c.Node,
		Log: log, Metrics: metrics,
	})
	if err != nil {
		return nil, err
	}
	if policy.BaseRoleARN == "auto" {
		if policy.BaseRoleARN, err = issuer.BaseRoleARN(ctx); err != nil {
			return nil, fmt.Errorf("-base-role-arn auto: %w", err)
		}
		log.InfoContext(ctx, "base role ARN found", "base_role_arn", policy.BaseRoleARN)
	}
	return issuer, policy.Validate()
}

// tokenFunc is a function as an sts.TokenSource: the issuer is made before the pods whose tokens it needs.
type tokenFunc func(ctx context.Context, namespace, serviceAccount, audience string) (string, error)

func (t tokenFunc) Token(ctx context.Context, namespace, serviceAccount, audience string) (string, error) {
	return t(ctx, namespace, serviceAccount, audience)
}

// serve runs the daemon until ctx is done. The order is construct, bind, redirect, sync, ready (the guard is in place). What it
// leaves behind on every way out are the rules: pods are refused, never let through.
func serve(ctx context.Context, c *Config, log *slog.Logger) error {
	if !c.Pprof {
		runtime.MemProfileRate = 0 // the profile that nobody can ask for is a megabyte
	}
	d, err := newDaemon(ctx, c, log)
	if err != nil {
		return err
	}
	// It is in place; this also learns who owns the rules now, and so when somebody else takes over.
	if err := d.rules.EnsureGuard(ctx); err != nil {
		return err
	}
	listeners, second, err := listen(ctx, c.HostIPs, c.Port)
	if err != nil {
		return err
	}
	for _, l := range listeners {
		log.Info("listening", "address", l.Addr().String(), "another_instance", second)
	}

	// Whatever answers pods goes on until the server has drained: a request accepted during the drain still needs its pod and
	// credentials. So only the server hears ctx; the rest ends after it.
	rest, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	g, rest := errgroup.WithContext(rest)
	task := func(ctx context.Context, name string, run func(context.Context) error) {
		g.Go(func() error {
			err := run(ctx)
			if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
				return nil
			}
			if err == nil {
				err = errors.New("ended by itself")
			}
			return fmt.Errorf("%s: %w", name, err)
		})
	}
	serving, stop := context.WithCancel(rest)
	defer stop()
	defer context.AfterFunc(ctx, func() {
		log.Info("stopping: pods are refused the endpoint until an instance runs again; the rules stay")
		stop()
	})()

	task(rest, "watch the pods", d.pods.Run)
	task(rest, "issue credentials", d.cache.Run)
	task(rest, "keep the rules", d.rules.Run)
	task(rest, "keep memory small", d.keepSmall)
	task(rest, "redirect", d.sendPodsHere(listeners, second))
	task(rest, "check the node's name", d.untilDone("the node's name may be wrong", d.checkNode))
	if c.StartupTaint != "" {
		task(rest, "remove the startup taint", d.untilDone("the startup taint stays", d.removeTaint))
	}
	g.Go(func() error {
		defer end()
		if err := d.server.Serve(serving, listeners...); err != nil && serving.Err() == nil {
			return fmt.Errorf("serve pods: %w", err)
		}
		return nil
	})
	d.serveOps(rest, task)
	return g.Wait()
}

// untilDone returns a task that tries until it succeeds, with a log line for each failure, and then has nothing left to do.
func (d *daemon) untilDone(failed string, try func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		for pause := time.Second; ; pause = min(2*pause, time.Minute) {
			err := try(ctx)
			if err == nil || ctx.Err() != nil {
				<-ctx.Done()
				return nil
			}
			d.log.ErrorContext(ctx, failed, "error", err.Error(), "retry_in", pause.String())
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(pause):
			}
		}
	}
}

// checkNode keeps what is wrong with the node's name for the page. It waits until the pods are known, since then none need be sent
// for it; with a name that is wrong there are none, so that is soon.
func (d *daemon) checkNode(ctx context.Context) error {
	if err := d.pods.WaitSynced(ctx); err != nil {
		return err
	}
	err := d.pods.NodeExists(ctx)
	d.nodeErr.Store(&err)
	return err
}

// removeTaint lets pods onto the node, once they would be answered. Nothing puts the taint back on exit: the rules stay.
func (d *daemon) removeTaint(ctx context.Context) error {
	if err := d.pods.WaitSynced(ctx); err != nil {
		return err
	}
	select {
	case <-d.redirected:
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := d.ready(ctx); err != nil {
		return fmt.Errorf("not ready: %w", err)
	}
	if err := d.pods.RemoveTaint(ctx, d.config.StartupTaint); err != nil {
		return err
	}
	d.log.InfoContext(ctx, "the node is free of the startup taint", "taint", d.config.StartupTaint)
	return nil
}

// sendPodsHere returns the task that redirects pods to the listeners. A second instance on the node (an update) waits until it
// could answer before it takes over from the first: until then no request is refused.
func (d *daemon) sendPodsHere(listeners []net.Listener, second bool) func(context.Context) error {
	return func(ctx context.Context) error {
		if d.config.Redirect != "none" {
			if second {
				if err := d.pods.WaitSynced(ctx); err != nil {
					return err
				}
			}
			var to []netip.AddrPort
			for _, l := range listeners {
				to = append(to, l.Addr().(*net.TCPAddr).AddrPort())
			}
			if err := d.rules.EnsureRedirect(ctx, to); err != nil {
				return err
			}
		}
		close(d.redirected)
		<-ctx.Done()
		return nil
	}
}

// listen binds port on every address or, where another instance holds it, the next one. second says that there is another
// instance: one of the two ports was taken. No SO_REUSEPORT: closing one of two such listeners loses connections.
func listen(ctx context.Context, ips []netip.Addr, port int) (listeners []net.Listener, second bool, err error) {
	bind := func(port int) (ls []net.Listener, err error) {
		for _, ip := range ips {
			// No probes: an idle connection ends after 75 s, one to a pod that is gone with the pod. They would be four system calls of the
			// fifteen that a connection with one request takes.
			lc := net.ListenConfig{KeepAlive: -1}
			// A connection of several paths would go on, as its first one's, over another when that one's address is the next pod's.
			lc.SetMultipathTCP(false)
			l, err := lc.Listen(ctx, "tcp", net.JoinHostPort(ip.String(), strconv.Itoa(port)))
			if err != nil {
				for _, l := range ls {
					l.Close()
				}
				if errors.Is(err, syscall.EADDRNOTAVAIL) {
					err = fmt.Errorf("%w: -host-ip (or HOST_IP) must be an address of this node", err)
				}
				return nil, fmt.Errorf("listen for pods: %w", err)
			}
			ls = append(ls, l)
		}
		return ls, nil
	}
	first, err := bind(port)
	if err != nil && !errors.Is(err, syscall.EADDRINUSE) {
		return nil, false, err
	}
	next, nextErr := bind(port + 1)
	switch {
	case err == nil && nextErr == nil:
		for _, l := range next {
			l.Close()
		}
		return first, false, nil
	case err == nil:
		return first, errors.Is(nextErr, syscall.EADDRINUSE), nil
	case nextErr == nil:
		return next, true, nil
	}
	return nil, false, fmt.Errorf("ports %d and %d are both taken: end the other program or set -port: %w", port, port+1, errors.Join(err, nextErr))
}

func cleanup(ctx context.Context, c *Config, stdout io.Writer, log *slog.Logger) error {
	rules, err := iptables.New(c.rules(log, prometheus.NewRegistry()))
	if err != nil {
		return err
	}
	if err := rules.Remove(ctx); err != nil {
		return fmt.Errorf("remove the rules: %w", err)
	}
	fmt.Fprintln(stdout, "every rule of imdsgate is gone from this node: pods reach the real metadata endpoint again, and the node's own role with it")
	return nil
}

func newRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "imdsgate_build_info", Help: "Always 1; the labels say what runs.",
	}, []string{"version", "goversion"})
	info.WithLabelValues(version(), runtime.Version()).Set(1)
	r.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// version is the module's, which the go command makes of the tag or the commit it builds from.
func version() string {
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "(devel)"
}

// shutdownTime bounds how long the ops listeners may take to end.
const shutdownTime = time.Second
