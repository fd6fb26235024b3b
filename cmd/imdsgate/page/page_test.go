package page

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imdsgate/imdsgate/cache"
	"github.com/imdsgate/imdsgate/proxy"
	"github.com/imdsgate/imdsgate/proxy/pods"
)

var now = time.Date(2026, 11, 22, 1, 0, 0, 0, time.UTC)

func granted(name string) pods.Explanation {
	return pods.Explanation{
		Namespace: "shop", Name: name, UID: name, ServiceAccount: "cart", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Source: "cni",
		Decision: pods.DecisionGranted, RoleARN: "arn:aws:iam::123456789012:role/team/cart", Prefetch: true,
		Steps: []pods.Step{{Mark: pods.OK, About: "role", Text: "it may have the role"}},
		Key:   &cache.Key{RoleARN: "arn:aws:iam::123456789012:role/team/cart", Duration: time.Hour},
	}
}

func refused(name, reason string, mark pods.Mark, text, fix string) pods.Explanation {
	return pods.Explanation{
		Namespace: "shop", Name: name, UID: name, ServiceAccount: "cart", Decision: pods.DecisionRefused, Reason: reason,
		Steps: []pods.Step{{Mark: mark, About: "role", Text: text, Fix: fix}},
	}
}

// What a pod gets, in a word, and what is said of its credentials.
func TestNewPod(t *testing.T) {
	ready := cache.Entry{State: cache.Ready, Issued: now.Add(-20 * time.Minute), Expires: now.Add(40 * time.Minute), NextIssue: now.Add(10 * time.Minute)}
	stsSays := &cache.IssueError{Code: "AccessDenied", Denied: true, Err: errors.New("AssumeRole: AccessDenied"), Hint: "add to its trust policy: {}"}
	with := func(change func(*cache.Entry)) *cache.Entry { e := ready; change(&e); return &e }
	elsewhere, twin, long := granted("irsa"), granted("twin"), granted("long")
	elsewhere.Prefetch = false
	twin.Steps = append(twin.Steps, pods.Step{Mark: pods.Bad, About: "address", Text: "more than one", Fix: "delete one"})
	long.Key.Duration = 4 * time.Hour
	for _, tt := range []struct {
		e            pods.Explanation
		entry        *cache.Entry
		status       Status
		problem, fix string
		last         string // step
	}{
		{e: granted("served"), entry: &ready, status: Served, last: "issued 20m ago, valid for 40m more, refreshed in 10m"},
		{e: granted("refreshing"), entry: with(func(e *cache.Entry) { e.NextIssue = time.Time{} }), status: Served, last: "being refreshed"},
		{e: granted("asked by -check"), entry: &cache.Entry{State: cache.Ready, Expires: now.Add(time.Hour)}, status: Served, last: "STS gives credentials for the role, valid for 1h"},
		{e: granted("not asked"), status: Waiting, last: "none yet"},
		{e: granted("asked"), entry: &cache.Entry{State: cache.Pending}, status: Waiting, last: "none yet: STS is being asked"},
		{e: granted("failing"), entry: &cache.Entry{State: cache.Failed, Err: stsSays}, status: Failing, problem: "AssumeRole: AccessDenied", fix: "add to its trust policy: {}", last: "AccessDenied"},
		{e: granted("stale"), entry: with(func(e *cache.Entry) { e.Err = fmt.Errorf("in between: %w", stsSays) }), status: Stale, problem: "valid for 40m more, but the last refresh failed: AssumeRole: AccessDenied", fix: "add to its trust policy: {}"},
		{e: elsewhere, status: Elsewhere},
		{e: elsewhere, entry: &ready, status: Elsewhere},
		{e: elsewhere, entry: &cache.Entry{State: cache.Failed, Err: errors.New("no")}, status: Failing, problem: "no"},
		{e: twin, entry: &ready, status: Refused, problem: "more than one", fix: "delete one"},
		{e: twin, status: Refused, problem: "more than one", fix: "delete one"},
		{e: long, entry: &ready, status: Served, fix: "raise the role's MaxSessionDuration", last: "STS gives sessions of 1h, not of the 4h"},
		{e: refused("denied", pods.ReasonDenied, pods.Bad, "not permitted", "annotate"), status: Refused, problem: "not permitted", fix: "annotate"},
		{e: refused("misplaced", pods.ReasonMisplaced, pods.Bad, "on the pod", "annotate"), status: Refused, problem: "on the pod", fix: "annotate"},
		{e: refused("none", pods.ReasonNoRole, pods.Note, "no role", "annotate"), status: NoRole, fix: "annotate"},
		{e: pods.Explanation{Decision: pods.DecisionNone, Reason: pods.ReasonHostNetwork}, status: HostNet},
		{e: pods.Explanation{Decision: pods.DecisionNone, Reason: pods.ReasonEnded}, status: Ended},
		{e: pods.Explanation{Decision: pods.DecisionUnknown, Reason: pods.ReasonIncomplete, Steps: []pods.Step{{Mark: pods.Bad, Text: "not known"}}}, status: Waiting, problem: "not known"},
	} {
		before := len(tt.e.Steps)
		p := NewPod(tt.e, tt.entry, now)
		if p.Status != tt.status || p.Problem != tt.problem || !strings.HasPrefix(p.Fix, tt.fix) || tt.fix == "" && p.Fix != "" {
			t.Errorf("%s: %s, %q, %q", tt.e.Name, p.Status, p.Problem, p.Fix)
		}
		if tt.last != "" && !strings.Contains(p.Steps[len(p.Steps)-1].Text, tt.last) {
			t.Errorf("%s: last step %q", tt.e.Name, p.Steps[len(p.Steps)-1])
		}
		if len(tt.e.Steps) != before || p.Status.rank() < 0 {
			t.Errorf("%s: %d steps, rank %d", tt.e.Name, len(tt.e.Steps), p.Status.rank())
		}
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 1400 * time.Millisecond: "1s", 59 * time.Second: "59s", time.Minute: "1m", 61 * time.Second: "1m 1s",
		10 * time.Minute: "10m", 59*time.Minute + 59*time.Second: "59m", time.Hour: "1h", 90 * time.Minute: "1h 30m", 24 * time.Hour: "1d", 49 * time.Hour: "2d 1h",
	} {
		if got := Span(d); got != want {
			t.Errorf("Span(%s) = %q, want %q", d, got, want)
		}
	}
}

// evil is in every text that comes from outside.
const evil = `"'></style></script><script>alert(1)</script><img src=x onerror=alert(2)>` + "\u202e{{.}}"

func hostile() *View {
	e := granted(evil)
	e.Namespace, e.ServiceAccount, e.RoleARN, e.SessionName = evil, evil, evil, evil
	e.Steps = []pods.Step{{Mark: pods.Bad, About: evil, Text: evil, Fix: evil}}
	return &View{
		Node: evil, Version: evil, Issuer: evil, Now: now, Started: now, NotReady: []string{evil}, Troubles: []string{evil},
		Rules: []Finding{{Severity: "error", About: evil, Text: evil, Fix: evil}, {Severity: evil, About: evil}},
		Pods:  []Pod{NewPod(e, &cache.Entry{State: cache.Failed, Err: errors.New(evil)}, now)},
		Denials: []proxy.Denial{
			{Last: now, Count: 2, Namespace: evil, Pod: evil, Reason: evil, Text: evil, Path: evil, Code: 403}, {Source: netip.MustParseAddr("10.0.0.1")},
		},
		Flags: []Flag{{Name: evil, Value: evil}, {Name: evil, Default: true}},
	}
}

// fixed is a Source that never changes.
type fixed struct{ v *View }

func (f fixed) View(context.Context) *View { return f.v }
func (f fixed) Pods() []Pod                { return f.v.Pods }

func serve(t *testing.T, v *View) http.Handler {
	t.Helper()
	mux := http.NewServeMux()
	New(fixed{v}).Register(mux)
	return mux
}

func ask(t *testing.T, h http.Handler, path string) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
	return w
}

// Nothing that a user or a pod wrote becomes markup, and the policy would not let it do anything.
func TestHostileTexts(t *testing.T) {
	h := serve(t, hostile())
	w := ask(t, h, "/?refresh=%22&show=%3Cscript%3E&q="+url.QueryEscape(`"><script>`))
	body := w.Body.String()
	for _, bad := range []string{"<script", "<img", "</style></script"} {
		if at := strings.Index(body, bad); at >= 0 {
			t.Errorf("%q is in the page: %s", bad, body[max(0, at-80):min(len(body), at+80)])
		}
	}
	if strings.Count(body, "<style>") != 1 || strings.Contains(body, `style="`) {
		t.Error("there is another style than the style sheet")
	}
	_, rest, _ := strings.Cut(body, "<style>")
	css, _, _ := strings.Cut(rest, "</style>")
	sum := sha256.Sum256([]byte(css))
	policy := w.Header().Get("Content-Security-Policy")
	if !strings.HasPrefix(policy, "default-src 'none'; ") || !strings.Contains(policy, "'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+"'") || strings.Contains(policy, "unsafe") {
		t.Errorf("policy %q is not that of this page", policy)
	}
	for _, path := range []string{"/debug/pods", "/debug/status"} {
		w := ask(t, h, path)
		if !json.Valid(w.Body.Bytes()) || strings.Contains(w.Body.String(), "<script") || w.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s: %s", path, w.Body)
		}
	}
	if w := ask(t, h, "/other"); w.Code != http.StatusNotFound {
		t.Errorf("/other is %d", w.Code)
	}
}

// A page of 250 pods lists first what somebody should look at, and finds each of them.
func TestFilter(t *testing.T) {
	v := &View{Node: "n", Now: now, Started: now.Add(-time.Hour)}
	for i := range 250 {
		e := granted(fmt.Sprintf("pod-%03d", i))
		e.IPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})}
		entry := &cache.Entry{State: cache.Ready, Issued: now, Expires: now.Add(time.Hour)}
		if i == 200 {
			entry = &cache.Entry{State: cache.Failed, Err: errors.New("AccessDenied: no")}
		}
		v.Pods = append(v.Pods, NewPod(e, entry, now))
	}
	v.Pods = append(v.Pods, NewPod(refused("lonely", pods.ReasonNoRole, pods.Note, "no role", ""), nil, now))
	names := func(query string) []string {
		q, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		var list []string
		for _, p := range show(v, q).Listed {
			list = append(list, p.Name)
		}
		return list
	}
	if all := names(""); len(all) != 251 || all[0] != "pod-200" || all[1] != "pod-000" || all[250] != "lonely" {
		t.Errorf("%d pods, first %q", len(all), all[:2])
	}
	for query, want := range map[string]string{
		"q=pod-123": "pod-123", "q=SHOP/POD-12+cart": "pod-120 pod-121 pod-122 pod-123 pod-124 pod-125 pod-126 pod-127 pod-128 pod-129", "q=10.0.0.17": "pod-017 pod-170 pod-171 pod-172 pod-173 pod-174 pod-175 pod-176 pod-177 pod-178 pod-179",
		"show=attention": "pod-200", "q=accessdenied": "pod-200", "q=failing": "pod-200", "show=rest": "lonely", "q=no_role": "lonely", "q=nothing+like+it": "", "q=pod-200&show=served": "",
	} {
		if d := cmp.Diff(want, strings.Join(names(query), " ")); d != "" {
			t.Errorf("%s (-want +got):\n%s", query, d)
		}
	}
	s := show(v, url.Values{"q": {"é" + strings.Repeat("x", 5000)}, "refresh": {"999999"}})
	if len(s.Query) > maxQuery || s.Refresh != maxRefresh || s.Tabs[1].Link != "/?q="+url.QueryEscape(s.Query)+"&refresh=3600&show=attention" {
		t.Errorf("%d bytes, %d s, %q", len(s.Query), s.Refresh, s.Tabs[1].Link)
	}
	if w := ask(t, serve(t, v), "/?refresh=1"); !strings.Contains(w.Body.String(), `<meta http-equiv="refresh" content="2">`) {
		t.Error("the refresh has no lower bound")
	}
}

// A request that a foreign page made a browser send here names that page's host.
func TestLocal(t *testing.T) {
	h := Local("imdsgate.internal:9182", http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	for host, want := range map[string]int{
		"localhost": 200, "localhost:8080": 200, "127.0.0.1": 200, "127.0.0.1:9182": 200, "[::1]:9182": 200, "[::1]": 200, "10.0.0.1:9182": 200, "imdsgate.internal": 200,
		"evil.example": 403, "evil.example:9182": 403, "127.0.0.1.nip.io:9182": 403, "localhost.evil.example": 403, "": 403, ":9182": 403, "imdsgate": 403,
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		r.Host = host
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("Host %q: %d, want %d", host, w.Code, want)
		}
	}
}

// The JSON can be read again, as -check does.
func TestJSON(t *testing.T) {
	e := granted("a")
	v := &View{Node: "n", Now: now, Pods: []Pod{NewPod(e, &cache.Entry{State: cache.Failed, Err: &cache.IssueError{Err: errors.New("no"), Hint: "do"}}, now)}}
	var got View
	if err := json.Unmarshal(ask(t, serve(t, v), "/debug/status").Body.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	p := got.Pods[0]
	if p.Name != "a" || p.Status != Failing || p.Problem != "no" || p.Fix != "do" || *p.Credentials != (Credentials{State: cache.Failed, Error: "no", Fix: "do"}) || p.Steps[1].Text != "no; fix: do" {
		t.Errorf("%+v %+v", p, p.Credentials)
	}
}
