package proxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/imdsgate/imdsgate/cache"
)

// The pods of the tests: every one is an address of the loopback network, from which the tests connect.
var podIPs = map[string]netip.Addr{
	"role":       netip.MustParseAddr("127.0.0.2"),
	"other":      netip.MustParseAddr("127.0.0.3"),
	"no-role":    netip.MustParseAddr("127.0.0.4"),
	"denied":     netip.MustParseAddr("127.0.0.5"),
	"invalid":    netip.MustParseAddr("127.0.0.6"),
	"sts-denied": netip.MustParseAddr("127.0.0.7"),
	"sts-down":   netip.MustParseAddr("127.0.0.8"),
	"ambiguous":  netip.MustParseAddr("127.0.0.9"),
	"incomplete": netip.MustParseAddr("127.0.0.10"),
	"unknown":    netip.MustParseAddr("127.0.0.11"),
	"special":    netip.MustParseAddr("127.0.0.12"),
	"short":      netip.MustParseAddr("127.0.0.13"),
}

const testRoleARN = "arn:aws:iam::123456789012:role/"

// callers is a CallerFinder that holds what the tests put in.
type callers struct {
	mu      sync.Mutex
	byIP    map[netip.Addr]*Caller
	errs    map[netip.Addr]error
	changed chan struct{}
}

func newCallers() *callers {
	return &callers{byIP: map[netip.Addr]*Caller{}, errs: map[netip.Addr]error{}, changed: make(chan struct{})}
}

func (f *callers) set(ip netip.Addr, c *Caller, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.byIP[ip], f.errs[ip] = c, err
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *callers) Find(ip netip.Addr) (*Caller, error) {
	c, _, err := f.find(ip)
	return c, err
}

func (f *callers) find(ip netip.Addr) (*Caller, chan struct{}, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.byIP[ip]; c != nil {
		return c, nil, nil
	}
	if err := f.errs[ip]; err != nil {
		return nil, f.changed, err
	}
	return nil, f.changed, ErrUnknownIP
}

func (f *callers) Wait(ctx context.Context, ip netip.Addr) (*Caller, error) {
	for {
		c, changed, err := f.find(ip)
		if err == nil {
			return c, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, err
		}
	}
}

// issuer answers by role name, as STS would.
type issuer struct {
	mu    sync.Mutex
	calls map[string]int
	delay time.Duration
	fail  func(key cache.Key) error
}

func (i *issuer) Issue(ctx context.Context, key cache.Key) (cache.Credentials, error) {
	i.mu.Lock()
	i.calls[key.RoleARN]++
	n, delay, fail := i.calls[key.RoleARN], i.delay, i.fail
	i.mu.Unlock()
	select {
	case <-time.After(delay):
	case <-ctx.Done():
		return cache.Credentials{}, ctx.Err()
	}
	if fail != nil {
		if err := fail(key); err != nil {
			return cache.Credentials{}, err
		}
	}
	name := key.RoleARN[strings.LastIndexByte(key.RoleARN, '/')+1:]
	switch name {
	case "refused-by-sts":
		return cache.Credentials{}, &cache.IssueError{
			Code: "AccessDenied", Denied: true, Hint: "let the trust policy of " + key.RoleARN + " name the node's role", Err: errors.New("STS refused AssumeRole (AccessDenied)"),
		}
	case "sts-is-down":
		return cache.Credentials{}, &cache.IssueError{Err: errors.New("STS does not answer")}
	}
	now := time.Now()
	expires := now.Add(time.Hour)
	if name == "short" {
		expires = now.Add(5 * time.Minute)
	}
	size := 900
	if strings.HasPrefix(name, "my+role") {
		size = 5000 // some are that long
	}
	return cache.NewCredentials(fmt.Sprintf("ASIA-%s-%d", name, n), secretOf(name), "TOKEN-"+strings.Repeat("t", size)+name, now, expires), nil
}

func (i *issuer) count(arn string) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.calls[arn]
}

// secretOf marks a role's credentials, so that they are found wherever they turn up.
func secretOf(role string) string { return "SECRET-of-" + role }

// reports records Events.
type reports struct {
	mu   sync.Mutex
	list []string
}

func (r *reports) Report(pod Pod, onServiceAccount bool, reason, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, fmt.Sprintf("%s/%s sa=%v %s: %s", pod.Namespace, pod.Name, onServiceAccount, reason, text))
}

func (r *reports) have(substr string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.list, func(s string) bool { return strings.Contains(s, substr) })
}

// realEndpoint stands for the node's real metadata endpoint: it requires session tokens, has credentials of the node, and
// logs every request as it came.
type realEndpoint struct {
	addr string
	ln   net.Listener

	mu       sync.Mutex
	log      []*http.Request
	tokens   int
	override http.HandlerFunc // nil: as described
}

const nodeSecret = "SECRET-of-the-node"

func newRealEndpoint(t testing.TB) *realEndpoint {
	t.Helper()
	ln := listen(t)
	e := &realEndpoint{addr: ln.Addr().String(), ln: ln}
	hs := &http.Server{Handler: http.HandlerFunc(e.serve)}
	go func() { _ = hs.Serve(ln) }()
	t.Cleanup(func() { _ = hs.Close() })
	return e
}

func (e *realEndpoint) serve(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	e.log = append(e.log, r)
	override := e.override
	token := fmt.Sprintf("node-token-%d", e.tokens)
	if r.Method == http.MethodPut {
		e.tokens++
		token = fmt.Sprintf("node-token-%d", e.tokens)
	}
	e.mu.Unlock()
	if override != nil {
		override(w, r)
		return
	}
	if r.Method == http.MethodPut && r.RequestURI == "/latest/api/token" {
		w.Header().Set(tokenTTLHeader, r.Header.Get(tokenTTLHeader))
		_, _ = io.WriteString(w, token)
		return
	}
	if r.Header.Get(tokenHeader) != token {
		http.Error(w, "unauthorized", http.StatusUnauthorized)
		return
	}
	body, ok := map[string]string{
		"/latest/meta-data/placement/region":                                           "eu-test-1",
		"/latest/meta-data/placement/availability-zone":                                "eu-test-1a",
		"/latest/meta-data/instance-id":                                                "i-0123456789abcdef0",
		"/latest/meta-data/instance-type":                                              "m5.large",
		"/latest/meta-data/mac":                                                        "0a:00:00:00:00:01",
		"/latest/meta-data/network/interfaces/macs/":                                   "0a:00:00:00:00:01/\n0a:00:00:00:00:02/\n",
		"/latest/meta-data/network/interfaces/macs/0a:00:00:00:00:01/vpc-id":           "vpc-1",
		"/latest/user-data":                                                            nodeSecret,
		"/latest/meta-data/iam/security-credentials/":                                  "node-role",
		"/latest/meta-data/iam/security-credentials/node-role":                         nodeSecret,
		"/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance": nodeSecret,
	}[r.RequestURI]
	if !ok {
		http.NotFound(w, r)
		return
	}
	_, _ = io.WriteString(w, body)
}

func (e *realEndpoint) set(h http.HandlerFunc) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.override = h
}

func (e *realEndpoint) requests() []*http.Request {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.log)
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// lab is a Server with everything around it, on the loopback.
type lab struct {
	*Server
	addr    string
	callers *callers
	issuer  *issuer
	cache   *cache.Cache
	reports *reports
	real    *realEndpoint
	logged  *lines
	metrics *prometheus.Registry
	stop    context.CancelFunc // of Serve
	served  chan error
}

// lines is a log that the tests read.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func grant(path string) *Grant {
	return &Grant{
		Key:  cache.Key{RoleARN: testRoleARN + path, SessionName: "session", Duration: time.Hour},
		Role: path[strings.LastIndexByte(path, '/')+1:], Path: path,
	}
}

func caller(name string, g *Grant, r *Refusal) *Caller {
	return &Caller{Pod: Pod{UID: name, Namespace: "shop", Name: name, ServiceAccount: name + "-sa"}, Grant: g, Refusal: r}
}

func newLab(t testing.TB, change ...func(*Options)) *lab {
	t.Helper()
	l := &lab{
		callers: newCallers(), issuer: &issuer{calls: map[string]int{}}, reports: &reports{}, real: newRealEndpoint(t),
		logged: &lines{}, metrics: prometheus.NewRegistry(), served: make(chan error, 1),
	}
	l.cache = cache.New(cache.Options{Issuer: l.issuer, Live: l.live, Encode: Encode, Rate: 1000})
	for name, c := range map[string]*Caller{
		"role":       caller("role", grant("team/my-role"), nil),
		"other":      caller("other", grant("other-role"), nil),
		"no-role":    caller("no-role", nil, &Refusal{Kind: NoRole, Text: "service account shop/no-role-sa has no eks.amazonaws.com/role-arn annotation"}),
		"denied":     caller("denied", nil, &Refusal{Kind: Denied, Event: EventRoleDenied, Text: "namespace shop does not permit the role"}),
		"invalid":    caller("invalid", nil, &Refusal{Kind: Invalid, Event: EventInvalidRoleARN, OnServiceAccount: true, Text: "not a role ARN"}),
		"sts-denied": caller("sts-denied", grant("refused-by-sts"), nil),
		"sts-down":   caller("sts-down", grant("sts-is-down"), nil),
		"special":    caller("special", grant("a/b/my+role=,.@-_x"), nil),
		"short":      caller("short", grant("short"), nil),
	} {
		l.callers.set(podIPs[name], c, nil)
	}
	l.callers.set(podIPs["ambiguous"], nil, fmt.Errorf("pods a-secret/x and b-secret/y: %w", ErrAmbiguousIP))
	l.callers.set(podIPs["incomplete"], nil, fmt.Errorf("waiting for namespace c-secret: %w", ErrIncomplete))

	o := Options{
		Callers: l.callers, Credentials: l.cache, Reports: l.reports, TokenKey: bytes.Repeat([]byte("k"), 32), IMDSv1: true,
		MetadataAddr: l.real.addr, Log: slog.New(slog.NewJSONHandler(l.logged, nil)), Metrics: l.metrics,
	}
	for _, f := range change {
		f(&o)
	}
	var err error
	if l.Server, err = NewServer(o); err != nil {
		t.Fatal(err)
	}
	ln := listen(t)
	l.addr = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	serveCtx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	l.stop = stop
	var wg sync.WaitGroup
	wg.Go(func() { _ = l.cache.Run(ctx) })
	go func() { l.served <- l.Serve(serveCtx, ln) }()
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		_ = ln.Close() // ends Serve with an error, without the drain's second
		stop()
	})
	return l
}

// live is what the cache keeps fresh: every role but those that STS does not give.
func (l *lab) live() iter.Seq2[cache.Key, bool] {
	return func(yield func(cache.Key, bool) bool) {
		l.callers.mu.Lock()
		defer l.callers.mu.Unlock()
		for _, c := range l.callers.byIP {
			if c != nil && c.Grant != nil && !yield(c.Grant.Key, false) {
				return
			}
		}
	}
}

// warm waits for the credentials of a pod.
func (l *lab) warm(t testing.TB, pods ...string) {
	t.Helper()
	for _, pod := range pods {
		c, err := l.callers.Find(podIPs[pod])
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.cache.Get(t.Context(), c.Grant.Key); err != nil {
			t.Fatal(err)
		}
	}
}

func dial(t testing.TB, addr string, from netip.Addr) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}, Timeout: 5 * time.Second}
	c, err := d.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

// reply is one answer as it came over the wire.
type reply struct {
	*http.Response
	body    string
	elapsed time.Duration
}

// readReply reads the answer to a request of the method.
func readReply(br *bufio.Reader, method string) (*reply, error) {
	resp, err := http.ReadResponse(br, &http.Request{Method: method})
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return &reply{Response: resp, body: string(body)}, err
}

// ask sends the request from the pod on a connection of its own.
func (l *lab) ask(t testing.TB, pod, request string) *reply {
	t.Helper()
	c := dial(t, l.addr, podIPs[pod])
	defer c.Close()
	start := time.Now()
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	method, _, _ := strings.Cut(request, " ")
	r, err := readReply(bufio.NewReader(c), method)
	if err != nil {
		t.Fatalf("%s: %v", request, err)
	}
	r.elapsed = time.Since(start)
	return r
}

// onTime fails unless one of three tries was. The machine may be somebody else's for a moment; what the server waits for it waits
// for every time.
func onTime(t testing.TB, what string, try func() (late bool)) {
	t.Helper()
	for range 3 {
		if !try() {
			return
		}
	}
	t.Errorf("%s: late three times", what)
}

func (l *lab) get(t testing.TB, pod, path string, headers ...string) *reply {
	t.Helper()
	return l.ask(t, pod, "GET "+path+" HTTP/1.1\r\nHost: 169.254.169.254\r\n"+lined(headers)+"\r\n")
}

func (l *lab) token(t testing.TB, pod string, ttl string) string {
	t.Helper()
	r := l.ask(t, pod, "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\n"+tokenTTLHeader+": "+ttl+"\r\nContent-Length: 0\r\n\r\n")
	if r.StatusCode != http.StatusOK {
		t.Fatalf("token: %d %s", r.StatusCode, r.body)
	}
	return r.body
}

func lined(headers []string) string {
	var b strings.Builder
	for _, h := range headers {
		b.WriteString(h + "\r\n")
	}
	return b.String()
}
