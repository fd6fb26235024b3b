package pods

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"

	"github.com/imdsgate/imdsgate/cache"
	"github.com/imdsgate/imdsgate/proxy"
)

// Options are what New needs. All are required but OnChange, OnMove and CNIResults.
type Options struct {
	Config  *rest.Config // rate limit and content type are set here
	Node    string       // spec.nodeName of the pods that are served
	Policy  *proxy.Policy
	Log     *slog.Logger
	Metrics prometheus.Registerer
	// OnChange is told that the keys of a service account's pods may have changed: a pod came or went, or one of the
	// objects that decide changed. It is called from several goroutines, without locks held; events wait while it runs.
	OnChange func(namespace, serviceAccount string)
	// OnMove is told that what Find says about an IP has changed: it is the pod's with this UID, or nobody's if that is empty. It is
	// called as OnChange is.
	OnMove func(ip netip.Addr, uid string)
	// CNIResults is libcni's directory of results, the second source of who holds an IP. Empty: the API server alone.
	CNIResults string
}

// Pods knows the pods of one node, their service accounts and their namespaces. It is safe for concurrent use.
type Pods struct {
	client                   *rest.RESTClient
	negotiator               runtime.ClientNegotiator // reads streams
	opening                  chan struct{}            // has one for each watch that is being opened
	buffers                  sync.Pool                // of events while they are read: most of the time there is none
	node                     string
	policy                   *proxy.Policy
	log                      *slog.Logger
	moving                   sync.Mutex
	onMove                   func(ip netip.Addr, uid string)
	onChange                 func(namespace, serviceAccount string)
	events                   *events
	failures                 failures
	backoff                  *wait.Backoff // between attempts to reach the API server; nil: client-go's, 0.8 s to 1 min
	openTimeout, listTimeout time.Duration // of one attempt
	minWatch                 time.Duration // at most, twice that
	waiting                  waiting
	asked                    chan struct{} // has one when a request waits for an IP that nobody has
	hurries                  *rate.Limiter // of pauses that end because of it
	count                    atomic.Int64
	synced                   chan struct{} // closed when it is
	results                  *results      // nil: off
	found                    [sources]prometheus.Counter

	ambiguous rate.Sometimes // log lines about IPs

	// table answers Find; nil until the pods were listed. It is replaced when an IP comes or goes. An answer is replaced in its place:
	// at the start each object that is read changes one, and a copy of a full node's table for each would be 30 KB.
	table atomic.Pointer[map[netip.Addr]*atomic.Pointer[answer]]

	mu         sync.Mutex           // guards what follows; never taken by Find
	pods       map[string]*resident // by UID
	byIP       map[netip.Addr][]*resident
	claims     claims
	accounts   map[types.NamespacedName]*used
	namespaces map[types.NamespacedName]*used
	listed     bool
	contact    contact
	spawn      func(func(context.Context)) context.CancelFunc // nil unless Run runs
}

var (
	_ proxy.CallerFinder = (*Pods)(nil)
	_ proxy.Reporter     = (*Pods)(nil)
)

// New does no I/O.
func New(o Options) (*Pods, error) {
	if o.Node == "" {
		return nil, errors.New("no node name: set -node or NODE_NAME")
	}
	client, negotiator, err := newClient(o.Config)
	if err != nil {
		return nil, err
	}
	p := &Pods{
		client:      client,
		negotiator:  negotiator,
		opening:     make(chan struct{}, maxOpening),
		buffers:     sync.Pool{New: func() any { return new(bytes.Buffer) }},
		asked:       make(chan struct{}, 1),
		hurries:     rate.NewLimiter(rate.Every(hurryEvery), 1),
		openTimeout: openTimeout, listTimeout: listTimeout, minWatch: minWatch,
		node:       o.Node,
		policy:     o.Policy,
		log:        o.Log,
		onChange:   o.OnChange,
		onMove:     o.OnMove,
		failures:   failures{now: make(map[*following]error), logged: make(map[string]time.Time)},
		synced:     make(chan struct{}),
		ambiguous:  rate.Sometimes{First: 10, Interval: time.Minute},
		pods:       make(map[string]*resident),
		byIP:       make(map[netip.Addr][]*resident),
		claims:     newClaims(),
		accounts:   make(map[types.NamespacedName]*used),
		namespaces: make(map[types.NamespacedName]*used),
	}
	p.events = newEvents(client, o.Node, o.Log, p.accountUID)
	if err := o.Metrics.Register(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "imdsgate_pods",
		Help: "Pods of this node that may ask for credentials.",
	}, func() float64 { return float64(p.count.Load()) })); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	found := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "imdsgate_identify_source_total",
		Help: "Requests whose pod was told, by what told it: the node's CNI results or the API server.",
	}, []string{"source"})
	if err := o.Metrics.Register(found); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	for s := range sources {
		p.found[s] = found.WithLabelValues(s.String())
	}
	if o.CNIResults != "" {
		p.results = newResults(p, o.CNIResults)
	}
	return p, nil
}

// Run follows the API server until ctx is done, and returns when its goroutines have ended. It can be called once. What is
// known stays known when the API server cannot be reached, and after Run.
func (p *Pods) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var tasks sync.WaitGroup
	p.mu.Lock()
	again := p.spawn != nil
	if !again {
		p.spawn = func(task func(context.Context)) context.CancelFunc {
			ctx, cancel := context.WithCancel(ctx)
			tasks.Go(func() { task(ctx) })
			return cancel
		}
	}
	p.mu.Unlock()
	defer tasks.Wait()
	defer cancel()
	if again {
		return errors.New("pods: Run was called twice")
	}
	tasks.Go(func() { p.events.run(ctx) })
	if p.results != nil {
		ready := make(chan struct{})
		tasks.Go(func() { p.results.run(ctx, sync.OnceFunc(func() { close(ready) })) })
		select { // nobody is found before both sources were read
		case <-ready:
		case <-ctx.Done():
		}
	}
	p.followPods(ctx)
	return nil
}

// Synced reports whether the pods were listed and every service account and namespace they use was seen or found absent.
// It stays true: later gaps concern single pods, and Find names them.
func (p *Pods) Synced() bool {
	select {
	case <-p.synced:
		return true
	default:
		return false
	}
}

// WaitSynced waits for Synced until ctx is done; then its error says what is missing.
func (p *Pods) WaitSynced(ctx context.Context) error {
	select {
	case <-p.synced:
		return nil
	case <-ctx.Done():
		if err := p.failures.err(); err != nil {
			return fmt.Errorf("%w: %w", proxy.ErrNotSynced, err)
		}
		return fmt.Errorf("%w: %w", proxy.ErrNotSynced, ctx.Err())
	}
}

// Err says which watches do not work at present; nil if all do.
func (p *Pods) Err() error { return p.failures.err() }

// answer is what Find says about one IP: one of the two is not nil. It is immutable.
type answer struct {
	caller *proxy.Caller
	err    error
	source source // of caller
}

// Find implements proxy.CallerFinder: two atomic reads, a counter, no lock, no allocation.
func (p *Pods) Find(ip netip.Addr) (*proxy.Caller, error) {
	table := p.table.Load()
	if table == nil {
		return nil, proxy.ErrNotSynced
	}
	place := (*table)[ip.Unmap()]
	if place == nil {
		return nil, proxy.ErrUnknownIP
	}
	a := place.Load()
	if a.caller != nil {
		p.found[a.source].Inc()
	}
	return a.caller, a.err
}

// Wait implements proxy.CallerFinder.
func (p *Pods) Wait(ctx context.Context, ip netip.Addr) (*proxy.Caller, error) {
	ip = ip.Unmap()
	for {
		// Joined before looking: what changes after the look wakes us.
		w := p.waiting.join(ip)
		c, err := p.Find(ip)
		if err == nil {
			p.waiting.leave(ip, w)
			return c, nil
		}
		select {
		case p.asked <- struct{}{}:
		default:
		}
		select {
		case <-w.woken:
		case <-ctx.Done():
			p.waiting.leave(ip, w)
			return p.Find(ip)
		}
	}
}

// Live yields the keys that the pods of this node are authorized for, bound or running, and whether to issue credentials before
// anybody asks: not for a pod that gets them from elsewhere. A key comes once for each of its pods. The loop's body must not call
// Pods: it holds the lock, which is cheaper than a copy of what a full node has.
func (p *Pods) Live() iter.Seq2[cache.Key, bool] {
	return func(yield func(cache.Key, bool) bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, r := range p.pods {
			if r.caller != nil && r.caller.Grant != nil && !yield(r.caller.Grant.Key, !r.ownSource) {
				return
			}
		}
	}
}

// waiting are the requests that Wait holds: as many as there are connections, at most.
type waiting struct {
	mu sync.Mutex
	on map[netip.Addr]*waiters
}

type waiters struct {
	n     int
	woken chan struct{}
}

func (w *waiting) join(ip netip.Addr) *waiters {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.on == nil {
		w.on = make(map[netip.Addr]*waiters)
	}
	on := w.on[ip]
	if on == nil {
		on = &waiters{woken: make(chan struct{})}
		w.on[ip] = on
	}
	on.n++
	return on
}

func (w *waiting) leave(ip netip.Addr, on *waiters) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if on.n--; on.n == 0 && w.on[ip] == on {
		delete(w.on, ip)
	}
}

func (w *waiting) wake(ip netip.Addr) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if on := w.on[ip]; on != nil {
		delete(w.on, ip)
		close(on.woken)
	}
}
