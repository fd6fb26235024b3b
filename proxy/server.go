package proxy

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Limits of the pod-facing port. Every pod of the node can reach it, so none of them may be able to exhaust it.
const (
	defaultHold           = 450 * time.Millisecond // the AWS SDK for Go v2 gives up on a header after 500 ms
	defaultConnectionsPer = DefaultMaxConnections / 4
	readHeaderTimeout     = 5 * time.Second
	writeTimeout          = 10 * time.Second
	bodyTimeout           = 500 * time.Millisecond // for what is left of a body that nobody reads
	idleTimeout           = 75 * time.Second
	maxHeaderBytes        = 16 << 10
	netHTTPSlop           = 4 << 10 // net/http reads this much more than MaxHeaderBytes
	drainQuiet            = time.Second
	drainLimit            = 5 * time.Second
	drainAccept           = 4 * time.Second // leaves what was accepted last the time for one whole hold
	tokenRefusalRate      = 50              // 401s a second and source IP
)

// DefaultMaxConnections is how many connections pods have together, unless Options says otherwise.
const DefaultMaxConnections = 1024

// Options configure a Server. Callers, Credentials and TokenKey are required.
type Options struct {
	Callers     CallerFinder
	Credentials CredentialSource
	Reports     Reporter      // nil: no Events
	TokenKey    []byte        // at least 32 random bytes; LoadTokenKey keeps them over restarts
	IMDSv1      bool          // false: 401 without a session token
	Hold        time.Duration // longest hold of a request, identifying and waiting for STS together; 0: 450 ms

	MetadataAddr string   // host or host:port of the real endpoint; empty: 169.254.169.254
	Allow        []string // further exact metadata paths to pass through, see ValidateAllow

	MaxConnections      int // 0: DefaultMaxConnections
	MaxConnectionsPerIP int // 0: 256

	Log     *slog.Logger          // nil: nothing is logged
	Metrics prometheus.Registerer // nil: not registered anywhere
}

// Server is the pod-facing metadata endpoint. It is safe for concurrent use.
type Server struct {
	callers     CallerFinder
	credentials CredentialSource
	reports     Reporter
	imdsv1      bool
	hold        time.Duration

	routes   routes
	tokens   *tokens
	upstream *upstream
	metrics  *metrics
	log      *slog.Logger
	values   *headerValues

	tokenRefusals *rateLimits[netip.Addr] // 401s by source IP
	logLines      *rateLimits[logCause]
	serverLines   *rateLimits[struct{}] // net/http's own complaints
	conns         *shares
	denials       denials

	accepted atomic.Int64 // when the newest connection came, Unix nanoseconds
	draining atomic.Bool
}

// NewServer returns a Server that neither listens nor asks anybody anything before Serve.
func NewServer(o Options) (*Server, error) {
	if o.Callers == nil || o.Credentials == nil {
		return nil, errors.New("proxy: Callers and Credentials are required")
	}
	if len(o.TokenKey) < tokenKeySize {
		return nil, fmt.Errorf("proxy: a token key needs %d bytes, not %d", tokenKeySize, len(o.TokenKey))
	}
	if o.Reports == nil {
		o.Reports = noReports{}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Hold <= 0 {
		o.Hold = defaultHold
	}
	if o.MaxConnections <= 0 {
		o.MaxConnections = DefaultMaxConnections
	}
	if o.MaxConnectionsPerIP <= 0 {
		o.MaxConnectionsPerIP = defaultConnectionsPer
	}
	if o.MetadataAddr == "" {
		o.MetadataAddr = MetadataIPv4
	}
	up, err := newUpstream(o.MetadataAddr, o.Hold*2/3, o.Log)
	if err != nil {
		return nil, err
	}
	table, err := newRoutes(o.Allow)
	if err != nil {
		return nil, err
	}
	m, err := newMetrics(o.Metrics)
	if err != nil {
		return nil, err
	}
	return &Server{
		callers: o.Callers, credentials: o.Credentials, reports: o.Reports, imdsv1: o.IMDSv1, hold: o.Hold,
		routes: table, tokens: newTokens(o.TokenKey), upstream: up, metrics: m, log: o.Log,
		values:        newHeaderValues(),
		tokenRefusals: newRateLimits[netip.Addr](tokenRefusalRate, tokenRefusalRate),
		logLines:      newRateLimits[logCause](1, 10),
		serverLines:   newRateLimits[struct{}](1, 10),
		conns:         newShares(o.MaxConnections, o.MaxConnectionsPerIP),
	}, nil
}

// Handler is what Serve serves, without its limits on connections.
func (s *Server) Handler() http.Handler { return http.HandlerFunc(s.serve) }

// Serve answers on the listeners until ctx is done, then drains and returns nil. Draining takes at most 5 s: it goes on
// accepting until no new connection has come for a second, so that whoever moves the redirect elsewhere loses none, tells
// every client to close, and finishes what is under way. Serve closes the listeners, which must not speak multipath TCP
// (withPeer). An error means that one of them failed; then nothing is drained.
func (s *Server) Serve(ctx context.Context, ln ...net.Listener) error {
	hs := s.httpServer()
	defer hs.Close()
	failed := make(chan error, len(ln))
	for _, l := range ln {
		if err := boundBuffers(l); err != nil {
			s.log.Warn("the kernel's buffers of connections are not bounded", "error", err)
		}
		go func() {
			failed <- hs.Serve(&listener{
				Listener: l, shares: s.conns, refused: s.metrics.denied[reasonConnections].Inc,
				accepted: func(now time.Time) { s.accepted.Store(now.UnixNano()) },
			})
		}()
	}
	select {
	case err := <-failed:
		return fmt.Errorf("serve the metadata endpoint: %w", err)
	case <-ctx.Done():
	}
	s.drain(context.WithoutCancel(ctx), hs)
	return nil
}

func (s *Server) httpServer() *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Server{
		Handler:                      s.Handler(),
		DisableGeneralOptionsHandler: true,
		ReadHeaderTimeout:            readHeaderTimeout,
		MaxHeaderBytes:               maxHeaderBytes - netHTTPSlop,
		ErrorLog:                     log.New(errorLog{s}, "", 0),
		ConnContext:                  withPeer,
		ConnState:                    connState,
		Protocols:                    protocols,
	}
}

// drain does not use http.Server.SetKeepAlivesEnabled or an early Shutdown: both cut off clients that are just about to
// send their next request.
func (s *Server) drain(ctx context.Context, hs *http.Server) {
	s.draining.Store(true)
	start := time.Now()
	last := start
	for {
		wait := min(time.Until(last.Add(drainQuiet)), time.Until(start.Add(drainAccept)))
		if wait <= 0 {
			break
		}
		time.Sleep(wait)
		if t := time.Unix(0, s.accepted.Load()); t.After(last) {
			last = t
		}
	}
	ctx, cancel := context.WithDeadline(ctx, start.Add(drainLimit))
	defer cancel()
	if err := hs.Shutdown(ctx); err != nil {
		s.log.Warn("connections to the metadata endpoint were cut off", "error", err)
	}
}

// errorLog brings what net/http complains about into the log, but never as a flood: pods cause it.
type errorLog struct{ s *Server }

func (l errorLog) Write(p []byte) (int, error) {
	if ok, suppressed := l.s.serverLines.allow(struct{}{}, time.Now()); ok {
		l.s.log.Warn("metadata endpoint", "error", strings.TrimSpace(string(p)), "suppressed", suppressed)
	}
	return len(p), nil
}

type noReports struct{}

func (noReports) Report(Pod, bool, string, string) {}
