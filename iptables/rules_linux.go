package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
)

// Options configure Rules.
type Options struct {
	Guard         bool // the policy-routing guard is wanted
	GuardPriority int  // the guard's rules go to P, P and P+1
	// Interface limits the redirect to an incoming interface: "eni+" for every name with that prefix, "!eth0" for every other.
	// Empty: all. What comes in elsewhere is refused by the guard.
	Interface string
	// StateDir holds the lock and the generation by which two instances agree who repairs. Empty: always this one.
	StateDir string
	Log      *slog.Logger          // nil: none
	Metrics  prometheus.Registerer // nil: none
}

// Rules are the redirect and the guard of this network namespace. Methods are safe for concurrent use.
type Rules struct {
	guard    bool
	priority uint32
	iface    string
	log      *slog.Logger
	owner    owner

	superseded chan struct{}
	supersede  func()
	guardWake  signal
	wake       signal
	handover   signal

	// The turn to work on the redirect, which may take as long as somebody holds the xtables lock. Its holder has what follows.
	turn     chan struct{}
	want     map[family]redirect
	backends map[family]*backend
	putFirst map[family]*rate.Limiter // how often the jump is put before other agents' rules

	mu       sync.Mutex
	verdicts map[subject]error // of the last verification
	failure  error             // of the last EnsureRedirect

	guardInPlace, redirectInPlace *prometheus.GaugeVec
	repairs                       *prometheus.CounterVec

	// For tests: the back end instead of PATH's choice, the time between two checks without an event, what to do after each
	// step at the guard.
	kind  string
	every time.Duration
	step  func(family, ruleOp)
}

// orderRate lets two agents restart, each of which puts its rules first, without a pod that waits. Whoever does it over and over
// is met by it twice a minute.
func orderRate() *rate.Limiter { return rate.NewLimiter(rate.Every(30*time.Second), 3) }

// subject is what a verdict is about.
type subject struct {
	what   string // guard or redirect: label of metrics
	family family
}

// New checks the options. It does nothing else and needs no privilege.
func New(o Options) (*Rules, error) {
	if o.GuardPriority < 0 || o.GuardPriority > 32765 {
		return nil, fmt.Errorf("guard priority %d: must be from 0 to 32765, before the main table", o.GuardPriority)
	}
	if name := strings.TrimPrefix(o.Interface, "!"); o.Interface != "" &&
		(name == "" || name == "+" || len(name) >= unix.IFNAMSIZ || strings.ContainsAny(name, "!/ \t\n\r\"'\\")) {
		return nil, fmt.Errorf("interface %q: must be a name (eth0) or a prefix (eni+), with or without ! before it", o.Interface)
	}
	r := &Rules{
		guard:      o.Guard,
		priority:   uint32(o.GuardPriority),
		iface:      o.Interface,
		log:        cmp.Or(o.Log, slog.New(slog.DiscardHandler)),
		superseded: make(chan struct{}),
		guardWake:  make(signal, 1),
		wake:       make(signal, 1),
		handover:   make(signal, 1),
		turn:       make(chan struct{}, 1),
		want:       map[family]redirect{},
		backends:   map[family]*backend{},
		putFirst:   map[family]*rate.Limiter{ipv4: orderRate(), ipv6: orderRate()},
		verdicts:   map[subject]error{},
		every:      30 * time.Second,
	}
	r.owner.dir = o.StateDir
	r.supersede = sync.OnceFunc(func() {
		r.log.Info("another instance has taken over the rules: repairing no more")
		close(r.superseded)
	})
	r.guardInPlace = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "imdsgate_guard_in_place", Help: "Whether the routing guard was whole at the last verification.",
	}, []string{"family"})
	r.redirectInPlace = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "imdsgate_redirect_in_place", Help: "Whether the redirect was whole at the last verification.",
	}, []string{"family"})
	r.repairs = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "imdsgate_repairs_total", Help: "Repairs of rules that somebody else had changed.",
	}, []string{"what"})
	for _, what := range []string{"guard", "redirect"} {
		r.repairs.WithLabelValues(what)
	}
	if o.Metrics != nil {
		for _, c := range []prometheus.Collector{r.guardInPlace, r.redirectInPlace, r.repairs} {
			if err := o.Metrics.Register(c); err != nil {
				return nil, fmt.Errorf("register metrics of the rules: %w", err)
			}
		}
	}
	return r, nil
}

// EnsureGuard makes the guard whole, in every address family that the kernel has; without Options.Guard it does nothing. It
// needs no iptables, no state directory and no ownership, and is the first thing to do.
func (r *Rules) EnsureGuard(ctx context.Context) error {
	if n, err := r.owner.read(); err == nil && r.owner.generation.Load() == 0 {
		r.owner.generation.Store(n)
	}
	if !r.guard {
		return nil
	}
	var errs []error
	for _, f := range families() {
		_, err := r.ensureGuard(ctx, f)
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("install the guard: %w", err)
	}
	return nil
}

// ensureGuard returns what it did.
func (r *Rules) ensureGuard(ctx context.Context, f family) ([]ruleOp, error) {
	done, err := r.completeGuard(ctx, f)
	if errors.Is(err, errNoFamily) && f == ipv6 {
		return nil, nil
	}
	if r.verdict(subject{"guard", f}, err) && err != nil {
		r.log.Error("guard is not whole", "family", f.String(), "error", err)
	}
	return done, err
}

func (r *Rules) completeGuard(ctx context.Context, f family) (done []ruleOp, err error) {
	for range 5 { // more than two only if somebody works against it
		have, err := listRules(f)
		if err != nil {
			return done, err
		}
		ops := planGuard(f, r.priority, have)
		if len(ops) == 0 {
			return done, nil
		}
		if err := r.applyGuard(ctx, f, ops); err != nil {
			return done, err
		}
		done = append(done, ops...)
	}
	return done, fmt.Errorf("the guard is not whole after %v: somebody works against it", done)
}

// EnsureRedirect makes the redirect lead to the given addresses of this node, at most one a family, and takes ownership of
// the rules. From one target to the next the change is one commit. A family without a target has the guard alone. Waiting for
// the xtables lock ends with ctx alone.
func (r *Rules) EnsureRedirect(ctx context.Context, to []netip.AddrPort) error {
	err := r.ensureRedirect(ctx, to)
	if err != nil {
		err = fmt.Errorf("install the redirect: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failure = err
	return err
}

func (r *Rules) ensureRedirect(ctx context.Context, to []netip.AddrPort) error {
	targets, err := checkTargets(to)
	if err != nil {
		return err
	}
	if err := r.takeTurn(ctx); err != nil {
		return err
	}
	defer r.endTurn()
	for f := range targets {
		if r.backends[f], err = probe(ctx, f, commandOf(f, r.kind)); err != nil {
			return err
		}
		r.log.Info("iptables found", "family", f.String(), "command", r.backends[f].command, "back_end", r.backends[f].mode)
	}
	clear(r.want)
	err = r.owner.locked(ctx, func() error {
		for _, f := range families() {
			if err := r.installRedirect(ctx, f, targets[f]); err != nil {
				return err
			}
		}
		if err := r.owner.take(); err != nil {
			return err
		}
		for _, f := range families() { // by now the instance before this one does not repair it
			if err := r.removeStaleGuard(ctx, f); err != nil {
				return err
			}
			r.removeOtherBackend(ctx, f)
		}
		return nil
	})
	if err != nil {
		clear(r.want) // the instance before this one is still the owner, and puts its rules back
	}
	return err
}

// checkTargets sorts the targets by family.
func checkTargets(to []netip.AddrPort) (map[family]netip.AddrPort, error) {
	node, err := nodeAddrs()
	if err != nil {
		return nil, err
	}
	targets := map[family]netip.AddrPort{}
	for _, t := range to {
		ip := t.Addr().Unmap()
		f := familyOf(ip)
		switch _, twice := targets[f]; {
		case !t.IsValid() || t.Port() == 0 || ip.Zone() != "":
			return nil, fmt.Errorf("target %s: not an address and port", t)
		case ip.IsLoopback() || ip.IsUnspecified() || ip.IsMulticast() || ip.IsLinkLocalUnicast() || ip == f.endpoint():
			return nil, fmt.Errorf("target %s: must be the node's own address (-host-ip)", t)
		case twice:
			return nil, fmt.Errorf("target %s: a second one of the same family", t)
		}
		if err := onNode(ip, node); err != nil {
			return nil, err
		}
		targets[f] = netip.AddrPortFrom(ip, t.Port())
	}
	if len(targets) == 0 {
		return nil, errors.New("no target address (-host-ip)")
	}
	return targets, nil
}

// onNode refuses a target that is no address of the node: the requests, and the credentials, would go to whoever has it.
func onNode(ip netip.Addr, node []netip.Addr) error {
	if slices.Contains(node, ip) {
		return nil
	}
	return fmt.Errorf("no interface of the node has the address %s (-host-ip)", ip)
}

// installRedirect brings one family to its wanted state.
func (r *Rules) installRedirect(ctx context.Context, f family, to netip.AddrPort) error {
	if !to.IsValid() {
		r.forget(subject{"redirect", f})
		if !r.guard {
			return nil // a redirect to nobody is all that keeps pods out
		}
		if err := removeRedirect(ctx, f); err != nil {
			r.log.Warn("an earlier redirect is still there", "family", f.String(), "error", err)
		}
		return ctx.Err()
	}
	b := r.backends[f]
	have, err := b.list(ctx, ourTables()[1])
	if err != nil {
		return err
	}
	for _, rule := range have.parent {
		if foreignNAT(f, rule) {
			r.log.Warn("a foreign rule wants the endpoint too; ours goes first", "family", f.String(), "rule", rule)
		}
	}
	d := redirect{iface: r.iface, to: to}
	if p := have.target(); p.IsValid() && p != to {
		d.previous = p
	}
	changed, err := applyRedirect(ctx, b, d)
	r.verdict(subject{"redirect", f}, err)
	if err != nil {
		return err
	}
	r.want[f] = d
	r.handover.raise()
	if changed {
		r.log.Info("redirect installed", "family", f.String(), "to", to, "previous", d.previous)
		r.cut(f, d)
	}
	return nil
}

// applyRedirect changes whatever differs. Somebody else's change in between fails the commit: then look again.
func applyRedirect(ctx context.Context, b *backend, d redirect) (changed bool, err error) {
	for range 5 {
		defects, script, e := inspect(ctx, b, d)
		if e != nil {
			return changed, e
		}
		if len(defects) == 0 || changed && onlyOrder(defects) {
			return changed, nil
		}
		if err = b.restore(ctx, script); err == nil {
			changed = true
			err = errors.Join(defects...)
		}
	}
	return changed, err
}

// inspect returns what is wrong with the redirect and the lines that put it right.
func inspect(ctx context.Context, b *backend, d redirect) (defects []error, script string, err error) {
	for _, t := range d.tables() {
		have, err := b.list(ctx, t)
		if err != nil {
			return nil, "", err
		}
		if err := t.defect(have, b.family.endpoint()); err != nil {
			defects = append(defects, err)
			script += t.restore(have)
		}
	}
	return defects, script, nil
}

// onlyOrder reports whether nothing but other agents' rules before our jump is wrong.
func onlyOrder(defects []error) bool {
	for _, err := range defects {
		if !errors.Is(err, errDisplaced) && !errors.Is(err, errTaken) {
			return false
		}
	}
	return true
}

// cut ends the connections that were open before the rules. The guard holds back what it misses.
func (r *Rules) cut(f family, d redirect) {
	ours := []netip.AddrPort{d.to}
	if !d.previousEnded {
		ours = append(ours, d.previous)
	}
	n, err := cutEscaped(f, ours...)
	if err != nil {
		r.log.Warn("connections opened before the redirect may last until they time out", "family", f.String(), "error", err)
	} else if n > 0 {
		r.log.Info("cut connections that were open before the redirect", "family", f.String(), "connections", n)
	}
}

// cutEnded cuts what led to the instance before this one, once that has no socket any more. Conntrack keeps a connection that was reset,
// or that its pod never ended, and takes no notice of a new one between the same addresses and ports: that of the next pod with the IP
// would go to a port where nobody listens, and be refused.
func (r *Rules) cutEnded(ctx context.Context) {
	if r.isSuperseded() || r.takeTurn(ctx) != nil {
		return
	}
	defer r.endTurn()
	for f, d := range r.want {
		if !d.previous.IsValid() || d.previousEnded {
			continue
		}
		used, err := inUse(f, d.previous.Port())
		var n uint
		if err == nil && !used {
			err = r.owner.locked(ctx, func() (err error) {
				if err = r.owner.check(); err == nil {
					n, err = cutEscaped(f, d.to)
				}
				return err
			})
		}
		switch {
		case errors.Is(err, errSuperseded): // what leads elsewhere leads to the next instance
			r.supersede()
			return
		case err != nil: // again after the interval
			r.log.Debug("connections to the instance before this one may last until they time out", "family", f.String(), "error", err)
		case used:
			time.AfterFunc(time.Second, r.handover.raise)
		default:
			d.previousEnded = true
			r.want[f] = d
			r.log.Debug("the instance before this one has ended, and conntrack has forgotten it", "family", f.String(), "entries", n)
		}
	}
}

// removeStaleGuard takes away what an earlier run left at another priority.
func (r *Rules) removeStaleGuard(ctx context.Context, f family) error {
	if !r.guard {
		return nil // fail closed: -cleanup removes it
	}
	have, err := listRules(f)
	if errors.Is(err, errNoFamily) {
		return nil
	}
	if err != nil {
		return err
	}
	return r.applyGuard(ctx, f, planRemoval(f, have, guardRules(f, r.priority)...))
}

// removeOtherBackend takes away the redirect that an earlier run made with the other back end: the kernel may go by that one first,
// and it leads to a port that nobody has any more.
func (r *Rules) removeOtherBackend(ctx context.Context, f family) {
	ours := r.backends[f]
	if ours == nil {
		return
	}
	for _, b := range backends(ctx, f) {
		if b.mode == ours.mode {
			continue
		}
		for _, t := range ourTables() {
			have, err := b.list(ctx, t)
			if err == nil && (have.exists || len(have.jumps()) > 0) {
				if err = b.restore(ctx, t.remove(have)); err == nil {
					r.log.Info("redirect of the other back end removed", "family", f.String(), "back_end", b.mode, "table", t.name)
				}
			}
			if err != nil {
				r.log.Warn("cannot tell whether the other back end holds a redirect of an earlier run: if imdsgate used it on this node, run -cleanup once",
					"family", f.String(), "back_end", b.mode, "error", err)
				break
			}
		}
	}
}

// Run verifies the rules on every event that may concern them and every 30 s, and repairs them while this instance owns them.
// It returns nil when ctx is done and removes nothing.
func (r *Rules) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	// A guard's check is one netlink dump; the redirect's runs iptables and may wait for its lock: neither holds up the other.
	g.Go(func() error {
		loop(ctx, r.guardWake, 100*time.Millisecond, r.every, r.verifyGuard)
		return nil
	})
	g.Go(func() error {
		loop(ctx, r.wake, time.Second, r.every, r.verifyRedirect)
		return nil
	})
	g.Go(func() error {
		loop(ctx, r.handover, time.Second, r.every, r.cutEnded)
		return nil
	})
	watch := func(what string, f func() error) {
		g.Go(func() error {
			if err := f(); err != nil {
				r.log.Warn("changes are seen at the next interval only", "of", what, "interval", r.every, "error", err)
			}
			return nil
		})
	}
	watch("routing rules, links and addresses", func() error {
		groups := []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_RULE}
		return subscribe(ctx, unix.NETLINK_ROUTE, groups, func(syscall.NetlinkMessage) {
			r.guardWake.raise()
			r.wake.raise()
		})
	})
	watch("nftables", func() error {
		return subscribe(ctx, unix.NETLINK_NETFILTER, []uint{unix.NFNLGRP_NFTABLES}, func(m syscall.NetlinkMessage) {
			if aboutUs(m) {
				r.wake.raise()
			}
		})
	})
	if r.owner.dir != "" {
		watch("ownership", func() error {
			return watchDir(ctx, r.owner.dir, func() {
				if errors.Is(r.owner.check(), errSuperseded) {
					r.supersede()
				}
			})
		})
	}
	return g.Wait()
}

func (r *Rules) verifyGuard(ctx context.Context) {
	if !r.guard || r.isSuperseded() {
		return
	}
	if err := r.owner.check(); errors.Is(err, errSuperseded) {
		r.supersede()
		return
	} else if err != nil {
		r.log.Warn("cannot tell who owns the rules", "error", err) // two that make the same guard do no harm
	}
	for _, f := range families() {
		ops, err := r.ensureGuard(ctx, f)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil && len(ops) > 0:
			r.repairs.WithLabelValues("guard").Inc()
			r.log.Warn("guard repaired", "family", f.String(), "steps", fmt.Sprint(ops))
		}
	}
}

func (r *Rules) verifyRedirect(ctx context.Context) {
	if r.isSuperseded() || r.takeTurn(ctx) != nil {
		return
	}
	defer r.endTurn()
	for _, f := range families() {
		d, ok := r.want[f]
		if !ok {
			continue
		}
		err := r.verifyFamily(ctx, r.backends[f], d)
		if ctx.Err() != nil || errors.Is(err, errSuperseded) {
			return
		}
		if r.verdict(subject{"redirect", f}, err) && err != nil {
			r.log.Error("redirect is not whole", "family", f.String(), "error", err)
		}
		if err != nil {
			time.AfterFunc(time.Second, r.wake.raise) // again, and before the next interval
		}
	}
}

// verifyFamily looks at one family's redirect and repairs it.
func (r *Rules) verifyFamily(ctx context.Context, b *backend, d redirect) error {
	node, err := nodeAddrs()
	if err != nil {
		return err
	}
	if err := onNode(d.to.Addr(), node); err != nil {
		return err
	}
	defects, _, err := inspect(ctx, b, d)
	if err != nil || len(defects) == 0 {
		return err
	}
	found := errors.Join(defects...)
	if onlyOrder(defects) {
		// Reported, not fought: whoever insists on the first place gets it for most of the time, and the guard holds.
		if !r.putFirst[b.family].Allow() {
			if errors.Is(found, errTaken) {
				return found
			}
			return nil
		}
	}
	err = r.owner.locked(ctx, func() error {
		if err := r.owner.check(); err != nil {
			return err
		}
		changed, err := applyRedirect(ctx, b, d)
		if changed {
			r.cut(b.family, d)
		}
		return err
	})
	if errors.Is(err, errSuperseded) {
		r.supersede()
		return err
	}
	if err != nil {
		return fmt.Errorf("%w: repair: %w", found, err)
	}
	r.repairs.WithLabelValues("redirect").Inc()
	r.log.Warn("redirect repaired", "family", b.family.String(), "found", found)
	return nil
}

// Superseded is closed when another instance has taken over the rules, seen while Run runs. This one repairs them no more; it
// goes on serving what still comes to its port, which stays locked, and should end.
func (r *Rules) Superseded() <-chan struct{} { return r.superseded }

func (r *Rules) isSuperseded() bool {
	select {
	case <-r.superseded:
		return true
	default:
		return false
	}
}

// Verified returns nil when the last verification found the guard, if wanted, and the redirect, once EnsureRedirect was called,
// whole. Otherwise it says what is missing.
func (r *Rules) Verified() error {
	if r.isSuperseded() {
		return errSuperseded
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.verdicts[subject{"guard", ipv4}]; r.guard && !ok {
		return errors.New("the guard has not been verified yet")
	}
	errs := []error{r.failure}
	for _, f := range families() {
		for _, what := range []string{"guard", "redirect"} {
			if err := r.verdicts[subject{what, f}]; err != nil {
				errs = append(errs, fmt.Errorf("%s %s: %w", f.String(), what, err))
			}
		}
	}
	return errors.Join(errs...)
}

// verdict records the result of a verification and reports whether it is news.
func (r *Rules) verdict(s subject, err error) bool {
	r.mu.Lock()
	before := r.verdicts[s]
	r.verdicts[s] = err
	r.mu.Unlock()
	v := 0.0
	if err == nil {
		v = 1
	}
	r.gauge(s).WithLabelValues(s.family.String()).Set(v)
	return fmt.Sprint(before) != fmt.Sprint(err)
}

func (r *Rules) forget(s subject) {
	r.mu.Lock()
	delete(r.verdicts, s)
	r.mu.Unlock()
	r.gauge(s).DeleteLabelValues(s.family.String())
}

func (r *Rules) gauge(s subject) *prometheus.GaugeVec {
	if s.what == "guard" {
		return r.guardInPlace
	}
	return r.redirectInPlace
}

// Remove takes away the redirect and the guard: every family, both back ends, whatever run left them. It takes ownership, so
// that a running instance does not repair them. It can be repeated; foreign rules stay.
func (r *Rules) Remove(ctx context.Context) error {
	if err := r.takeTurn(ctx); err != nil {
		return err
	}
	defer r.endTurn()
	clear(r.want)
	var errs []error
	locked := r.owner.locked(ctx, func() error {
		errs = append(errs, r.owner.take(), r.remove(ctx))
		return nil
	})
	if locked != nil && ctx.Err() == nil { // no state directory, no other instance
		r.log.Warn("removing the rules without the lock", "error", locked)
		locked = r.remove(ctx)
	}
	if err := errors.Join(append(errs, locked)...); err != nil {
		return fmt.Errorf("remove the rules: %w", err)
	}
	return nil
}

// remove goes on after an error: what can go, goes. The redirect goes first: the guard refuses pods until the end.
func (r *Rules) remove(ctx context.Context) error {
	var errs []error
	for _, f := range families() {
		errs = append(errs, removeRedirect(ctx, f))
		r.forget(subject{"redirect", f})
	}
	for _, f := range families() {
		have, err := listRules(f)
		if errors.Is(err, errNoFamily) {
			continue
		}
		if err == nil {
			err = r.applyGuard(ctx, f, planRemoval(f, have))
		}
		errs = append(errs, err)
		r.forget(subject{"guard", f})
	}
	return errors.Join(errs...)
}

// removeRedirect takes our chains out of both back ends of a family.
func removeRedirect(ctx context.Context, f family) error {
	if _, err := listRules(f); errors.Is(err, errNoFamily) {
		return nil
	}
	var errs []error
	for _, b := range backends(ctx, f) {
		for _, t := range ourTables() {
			have, err := b.list(ctx, t)
			if err == nil {
				err = b.restore(ctx, t.remove(have))
			}
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (r *Rules) takeTurn(ctx context.Context) error {
	select {
	case r.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *Rules) endTurn() { <-r.turn }
