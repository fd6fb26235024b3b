package page

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed" // the style sheet
	"encoding/base64"
	"encoding/json"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/proxy"
)

//go:embed style.css
var style string

// maxQuery bounds the filter, in bytes.
const maxQuery = 200

// Bounds of the refresh interval, in seconds.
const (
	minRefresh = 2
	maxRefresh = 3600
)

// Source has what is shown, as it is now. It is safe for concurrent use.
type Source interface {
	View(ctx context.Context) *View
	Pods() []Pod // of the View, without what takes longer
}

// Page serves what a Source has. Make it with New.
type Page struct {
	source Source
	policy string
}

// New returns the page of a source.
func New(from Source) *Page {
	sum := sha256.Sum256([]byte(style))
	return &Page{
		source: from,
		policy: "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'; img-src data:; " +
			"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
	}
}

// Register puts the page and its JSON on a mux: /, /debug/status and /debug/pods.
func (p *Page) Register(mux *http.ServeMux) {
	mux.HandleFunc("GET /{$}", p.html)
	mux.HandleFunc("GET /debug/status", p.json(func(ctx context.Context) any { return p.source.View(ctx) }))
	mux.HandleFunc("GET /debug/pods", p.json(func(context.Context) any { return p.source.Pods() }))
}

func (p *Page) json(of func(context.Context) any) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetIndent("", "  ")
		if err := e.Encode(of(r.Context())); err != nil {
			http.Error(w, "the state cannot be encoded", http.StatusInternalServerError)
			return
		}
		p.write(w, "application/json", b.Bytes())
	}
}

func (p *Page) html(w http.ResponseWriter, r *http.Request) {
	var b bytes.Buffer
	if err := show(p.source.View(r.Context()), r.URL.Query()).html().Render(&b); err != nil {
		http.Error(w, "the page cannot be made", http.StatusInternalServerError)
		return
	}
	p.write(w, "text/html; charset=utf-8", b.Bytes())
}

func (p *Page) write(w http.ResponseWriter, contentType string, body []byte) {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", p.policy)
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("X-Content-Type-Options", "nosniff")
	_, _ = w.Write(body) // fails only when the client has left
}

// Local admits requests whose Host is an IP address, localhost, or the host of the address that is listened on. Other names
// may be a foreign page's, which its browser was told to find here.
func Local(address string, next http.Handler) http.Handler {
	own, _, _ := net.SplitHostPort(address)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
		_, err := netip.ParseAddr(host)
		if err != nil && host != "localhost" && (host == "" || host != own) {
			http.Error(w, "this page is for localhost: ask for it by http://localhost or by an IP address", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// shown is a View with what the request asks to see of it.
type shown struct {
	*View
	Query   string
	Show    string // all, attention, served or rest
	Refresh int    // seconds; 0: off

	Listed    []Pod
	Tabs      []tab
	Attention int
	Bad       []Finding // of the rules, what is not as it should be
	ByIP      map[netip.Addr]string
}

type tab struct {
	Name, Show string
	Count      int
	Current    bool
	Link       string
}

func show(v *View, q url.Values) *shown {
	s := &shown{
		View: v, Query: strings.ToValidUTF8(strings.TrimSpace(q.Get("q")), ""), Show: q.Get("show"),
		ByIP: make(map[netip.Addr]string),
	}
	s.Query = strings.ToValidUTF8(s.Query[:min(len(s.Query), maxQuery)], "")
	if n, err := strconv.Atoi(q.Get("refresh")); err == nil && n > 0 {
		s.Refresh = min(max(n, minRefresh), maxRefresh)
	}
	groups := []string{"all", "attention", "served", "rest"}
	if !slices.Contains(groups, s.Show) {
		s.Show = "all"
	}
	counts := map[string]int{}
	sorted := slices.Clone(v.Pods)
	Sort(sorted)
	for _, p := range sorted {
		for _, ip := range p.IPs {
			if p.Status != Ended {
				s.ByIP[ip] = p.Namespace + "/" + p.Name
			}
		}
		if p.Status.Attention() {
			s.Attention++
		}
		if !p.matches(s.Query) {
			continue
		}
		group := group(p.Status)
		counts["all"]++
		counts[group]++
		if s.Show == "all" || s.Show == group {
			s.Listed = append(s.Listed, p)
		}
	}
	names := map[string]string{"all": "All", "attention": "Need attention", "served": "Served", "rest": "Not served here"}
	for _, g := range groups {
		s.Tabs = append(s.Tabs, tab{names[g], g, counts[g], g == s.Show, s.link(g)})
	}
	for _, f := range v.Rules {
		if f.Severity != "info" {
			s.Bad = append(s.Bad, f)
		}
	}
	return s
}

func group(s Status) string {
	switch {
	case s.Attention():
		return "attention"
	case s == Served, s == Waiting:
		return "served"
	}
	return "rest"
}

// link is the page with another group shown.
func (s *shown) link(show string) string {
	q := url.Values{}
	if s.Query != "" {
		q.Set("q", s.Query)
	}
	if show != "all" {
		q.Set("show", show)
	}
	if s.Refresh != 0 {
		q.Set("refresh", strconv.Itoa(s.Refresh))
	}
	return "/?" + q.Encode()
}

// ago is how long before the View's time t was.
func (s *shown) ago(t time.Time) string { return Span(s.Now.Sub(t)) }

// in is how long after the View's time t is.
func (s *shown) in(t time.Time) string { return Span(t.Sub(s.Now)) }

// who is the pod that a refused request came from.
func (s *shown) who(d proxy.Denial) string {
	if d.Pod != "" {
		return d.Namespace + "/" + d.Pod
	}
	return s.ByIP[d.Source.Unmap()]
}

// share is how much of the credentials' life is over, in percent.
func (s *shown) share(c *Credentials) int {
	life := c.Expires.Sub(c.Issued)
	if life <= 0 {
		return 100
	}
	return int(min(max(s.Now.Sub(c.Issued)*100/life, 0), 100))
}

func lastSegment(arn string) string { return arn[strings.LastIndexByte(arn, '/')+1:] }
