package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"
)

// passthrough are the metadata that every pod may read, below /latest/meta-data/: none of them is a secret or names an
// identity that somebody trusts.
func passthrough() []string {
	return []string{
		"ami-id", "ami-launch-index", "hostname", "instance-id", "instance-life-cycle", "instance-type", "local-hostname",
		"local-ipv4", "mac", "placement/availability-zone", "placement/availability-zone-id", "placement/region",
		"services/domain", "services/partition",
	}
}

// forbidden are path segments that -allow may not contain, wherever they stand: credentials, bootstrap secrets, and
// documents that let their bearer log in as the node.
func forbidden() []string {
	return []string{"iam", "identity-credentials", "security-credentials", "user-data", "pkcs7", "signature", "rsa2048"}
}

const (
	macList     = metaData + "network/interfaces/macs/"
	macSegment  = "{mac}"
	macLen      = len("0a:00:00:00:00:01")
	maxMACs     = 64 // entries kept per path; an instance has at most some tens of interfaces
	upstreamMax = 64 << 10

	upstreamFresh = 60 * time.Second
	upstreamRetry = time.Second // after a failure
	upstreamTTL   = 6 * time.Hour
)

// ValidateAllow says which of the further metadata paths of -allow cannot be passed through: iam/, identity-credentials/,
// user-data and the signed forms of the instance identity document in any spelling, and everything that is not canonical.
// A path is relative to /latest/meta-data/, or begins with dynamic/, meta-data/ or /latest/; {mac} stands for the MAC
// address in network/interfaces/macs/{mac}/.
func ValidateAllow(paths []string) error {
	var errs []error
	for _, p := range paths {
		_, err := canonicalAllow(p)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// canonicalAllow returns the whole path without a trailing slash.
func canonicalAllow(allow string) (string, error) {
	fail := func(why string) (string, error) {
		return "", fmt.Errorf("metadata path %q cannot be passed through: %s", allow, why)
	}
	p := strings.TrimPrefix(strings.TrimPrefix(strings.TrimSuffix(allow, "/"), "/"), "latest/")
	if !strings.HasPrefix(p, "meta-data/") && !strings.HasPrefix(p, "dynamic/") {
		p = "meta-data/" + p
	}
	p = "/latest/" + p
	if rest, ok := strings.CutPrefix(p, macList+macSegment); ok {
		if rest != "" && rest[0] != '/' {
			return fail("{mac} stands for a whole segment")
		}
	}
	for i, segment := range strings.Split(p, "/")[1:] {
		for _, f := range forbidden() {
			if strings.EqualFold(segment, f) {
				return fail(f + " would hand out what belongs to the node")
			}
		}
		switch {
		case segment == macSegment && i == strings.Count(macList, "/")-1 && strings.HasPrefix(p, macList):
		case segment == "" || segment == "." || segment == "..",
			i == 2 && (segment == "latest" || segment == "meta-data" || segment == "dynamic"): // nothing behind them
			return fail("it is not canonical")
		case strings.ContainsFunc(segment, notPathRune):
			return fail("a segment consists of letters, digits and -._:@=+, only")
		}
	}
	return p, nil
}

func notPathRune(r rune) bool {
	return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("-._:@=+,", r))
}

// pass adds a passed-through path to the table, with and without a trailing slash.
func (t *routes) pass(path string) {
	if prefix, suffix, ok := strings.Cut(path, macSegment); ok {
		t.macs = append(t.macs, newMACRoute(prefix, suffix))
		return
	}
	e := &entry{path: path}
	rt := &route{handler: handlerMetadata, allow: get, pod: func(q request, c *Caller) answer { return q.passed(c, e) }}
	t.exact[path], t.exact[path+"/"] = rt, rt
}

// passed answers with the value of an entry.
func (q request) passed(c *Caller, e *entry) answer {
	ctx, cancel := q.context()
	defer cancel()
	body, err := q.s.upstream.get(ctx, e)
	if err != nil {
		return q.refuse(c, err)
	}
	return answer{body: body, caller: c}
}

// macRoute is a path with {mac}.
type macRoute struct {
	prefix, suffix string
	route          *route
}

func newMACRoute(prefix, suffix string) macRoute {
	m := &macEntries{prefix: prefix, suffix: suffix, list: &entry{path: prefix}, entries: map[string]*entry{}}
	return macRoute{prefix, suffix, &route{handler: handlerMetadata, allow: get, pod: m.answer}}
}

func (m macRoute) match(path string) (mac string, ok bool) {
	rest, ok := strings.CutPrefix(path, m.prefix)
	if !ok || len(rest) < macLen || strings.TrimSuffix(rest[macLen:], "/") != m.suffix {
		return "", false
	}
	return rest[:macLen], true
}

// macEntries are the entries of one path with {mac}. Only a MAC address that the real endpoint itself lists gets one, so
// that a pod can make neither memory grow nor requests to the real endpoint.
type macEntries struct {
	prefix, suffix string
	list           *entry

	mu      sync.Mutex
	entries map[string]*entry
}

func (m *macEntries) answer(q request, c *Caller) answer {
	ctx, cancel := q.context()
	defer cancel()
	list, err := q.s.upstream.get(ctx, m.list)
	if err != nil {
		return q.refuse(c, err)
	}
	for line := range strings.Lines(string(list)) {
		if listed := strings.TrimRight(line, "/\r\n"); listed == q.name && isMAC(listed) {
			return q.passed(c, m.entry(listed))
		}
	}
	return q.refuse(c, errAbsent)
}

func (m *macEntries) entry(mac string) *entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[mac]
	if e == nil {
		if len(m.entries) >= maxMACs {
			clear(m.entries)
		}
		e = &entry{path: m.prefix + mac + m.suffix}
		m.entries[mac] = e
	}
	return e
}

func isMAC(s string) bool {
	hw, err := net.ParseMAC(s)
	return err == nil && len(hw) == 6 && hw.String() == s
}

// upstream asks the real endpoint. What it sends is made of table entries alone: no byte of a pod's request is in it.
type upstream struct {
	base    string
	client  *http.Client
	timeout time.Duration // of one fetch, the token's included
	log     *slog.Logger

	tokenLock chan struct{} // held by who reads or renews the token
	token     string
	renew     time.Time
}

func newUpstream(addr string, timeout time.Duration, log *slog.Logger) (*upstream, error) {
	base := addr
	if ip, err := netip.ParseAddr(addr); err == nil && ip.Is6() {
		base = "[" + addr + "]"
	}
	u, err := url.Parse("http://" + base)
	if err != nil || u.Host != base || u.Hostname() == "" {
		return nil, fmt.Errorf("metadata address %q: must be host or host:port", addr)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &upstream{
		base: u.String(), timeout: timeout, log: log, tokenLock: make(chan struct{}, 1),
		client: &http.Client{
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			Transport: &http.Transport{ // not the default one: it would ask a proxy of the environment
				DialContext:            (&net.Dialer{Timeout: timeout}).DialContext,
				DisableCompression:     true,
				MaxConnsPerHost:        8,
				MaxIdleConnsPerHost:    2,
				IdleConnTimeout:        time.Minute,
				MaxResponseHeaderBytes: maxHeaderBytes,
				Protocols:              protocols,
			},
		},
	}, nil
}

// entry is one path of the real endpoint and its last answer.
type entry struct {
	path string

	mu      sync.Mutex
	fetched time.Time // of the answer; zero: there is none
	found   bool
	body    []byte
	retry   time.Time     // after a failure: not before
	flight  chan struct{} // closed when the fetch under way is over; nil: there is none
}

// get returns e's value: at most a minute old, older only while the real endpoint does not answer.
func (u *upstream) get(ctx context.Context, e *entry) ([]byte, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	if now.Sub(e.fetched) >= upstreamFresh && !now.Before(e.retry) {
		if e.flight == nil {
			e.flight = make(chan struct{})
			go u.fill(context.WithoutCancel(ctx), e) // ends after u.timeout, whether or not this request still waits for it
		}
		flight := e.flight
		e.mu.Unlock()
		select {
		case <-flight:
		case <-ctx.Done():
		}
		e.mu.Lock()
	}
	switch {
	case e.fetched.IsZero():
		return nil, errUpstream
	case !e.found:
		return nil, errAbsent
	}
	return e.body, nil
}

// fill replaces e's value, or keeps it when there is no answer.
func (u *upstream) fill(ctx context.Context, e *entry) {
	ctx, cancel := context.WithTimeout(ctx, u.timeout)
	defer cancel()
	body, found, err := u.fetch(ctx, e.path)
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil {
		e.retry = time.Now().Add(upstreamRetry)
		u.log.Warn("the instance's metadata cannot be read", "path", e.path, "error", err)
	} else {
		e.body, e.found, e.fetched = body, found, time.Now()
	}
	close(e.flight)
	e.flight = nil
}

func (u *upstream) fetch(ctx context.Context, path string) (body []byte, found bool, err error) {
	for range 2 { // once more with a new token
		token, err := u.sessionToken(ctx)
		if err != nil {
			return nil, false, err
		}
		code, body, err := u.do(ctx, http.MethodGet, path, tokenHeader, token)
		switch {
		case err != nil:
			return nil, false, err
		case code == http.StatusOK:
			return body, true, nil
		case code == http.StatusNotFound:
			return nil, false, nil
		case code != http.StatusUnauthorized:
			return nil, false, fmt.Errorf("get %s: status %d", path, code)
		}
		u.dropToken(ctx, token)
	}
	return nil, false, fmt.Errorf("get %s: session token refused", path)
}

func (u *upstream) sessionToken(ctx context.Context) (string, error) {
	select {
	case u.tokenLock <- struct{}{}:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	defer func() { <-u.tokenLock }()
	if time.Now().Before(u.renew) {
		return u.token, nil
	}
	start := time.Now()
	code, body, err := u.do(ctx, http.MethodPut, "/latest/api/token", tokenTTLHeader, fmt.Sprint(int(upstreamTTL.Seconds())))
	if err != nil {
		return "", err
	}
	if code != http.StatusOK || len(body) == 0 {
		return "", fmt.Errorf("get a session token: status %d", code)
	}
	u.token, u.renew = string(body), start.Add(upstreamTTL/2)
	return u.token, nil
}

// dropToken forgets a token that was refused, unless somebody has renewed it meanwhile.
func (u *upstream) dropToken(ctx context.Context, token string) {
	select {
	case u.tokenLock <- struct{}{}:
		if u.token == token {
			u.renew = time.Time{}
		}
		<-u.tokenLock
	case <-ctx.Done():
	}
}

func (u *upstream) do(ctx context.Context, method, path, header, value string) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, u.base+path, nil)
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set(header, value)
	req.Header.Set("User-Agent", "imdsgate")
	resp, err := u.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, upstreamMax+1))
	if err != nil {
		return 0, nil, err
	}
	if len(body) > upstreamMax {
		return 0, nil, fmt.Errorf("%s %s: answer of more than %d bytes", method, path, upstreamMax)
	}
	return resp.StatusCode, body, nil
}
