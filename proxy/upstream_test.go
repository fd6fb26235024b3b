package proxy

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

const region = metaData + "placement/region"

func TestPassthrough(t *testing.T) {
	l := newLab(t, func(o *Options) {
		o.Allow = []string{"tags/instance/Name/", "/latest/dynamic/instance-identity/document", "network/interfaces/macs/{mac}/vpc-id"}
	})
	var asked []string
	l.real.set(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			_, _ = io.WriteString(w, "node-token")
			return
		}
		switch r.RequestURI {
		case macList:
			_, _ = io.WriteString(w, "0a:00:00:00:00:01/\n0a:00:00:00:00:02/\n../../../user-data\n")
		default:
			_, _ = io.WriteString(w, "value of "+r.RequestURI)
		}
	})
	for _, p := range append(passthrough(), "tags/instance/Name", "network/interfaces/macs/0a:00:00:00:00:01/vpc-id") {
		asked = append(asked, metaData+p)
	}
	asked = append(asked, "/latest/dynamic/instance-identity/document")
	for _, p := range asked {
		for _, slash := range []string{"", "/"} {
			if r := l.get(t, "no-role", p+slash); r.StatusCode != 200 || r.body != "value of "+p {
				t.Errorf("%s: %d %q", p+slash, r.StatusCode, r.body)
			}
		}
	}
	for _, p := range []string{
		"network/interfaces/macs/0a:00:00:00:00:03/vpc-id", "network/interfaces/macs/0A:00:00:00:00:01/vpc-id", "network/interfaces/macs/",
		"network/interfaces/macs/0a-00-00-00-00-01/vpc-id", "network/interfaces/macs/0a:00:00:00:00:01/", "network/interfaces/macs/{mac}/vpc-id",
		"network/interfaces/macs/0a:00:00:00:00:01/vpc-id/x", "network/interfaces/macs/../../../user-d/vpc-id", "network/interfaces/macs//vpc-id",
		"network/interfaces/macs/../../../user-data/vpc-id", "tags/instance/name", "dynamic/instance-identity/document",
	} {
		if r := l.get(t, "role", metaData+p); r.StatusCode != 404 {
			t.Errorf("%s: %d %q", p, r.StatusCode, r.body)
		}
	}
	want := map[string]int{"PUT /latest/api/token": 1, "GET " + macList: 1}
	for _, p := range asked {
		want["GET "+p] = 1
	}
	got := map[string]int{}
	for _, r := range l.real.requests() {
		got[r.Method+" "+r.RequestURI]++
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error("the real endpoint was asked otherwise:", d)
	}
}

// What goes to the real endpoint is made of the table alone.
func TestNothingOfTheClientGoesUpstream(t *testing.T) {
	l := newLab(t)
	own := l.token(t, "role", "60")
	l.ask(t, "role", "GET http://169.254.169.254:80"+region+"/?secret=query HTTP/1.1\r\nHost: 169.254.169.254\r\n"+tokenHeader+": "+own+
		"\r\nCookie: secret\r\nX-Secret: secret\r\nUser-Agent: secret\r\nX-Forwarded-For: 10.0.0.1\r\nConnection: X-Secret\r\nTE: trailers\r\nRange: bytes=0-1\r\nContent-Length: 6\r\n\r\nsecret")
	requests := l.real.requests()
	if len(requests) != 2 {
		t.Fatalf("%d requests", len(requests))
	}
	for i, want := range []struct {
		line   string
		header http.Header
	}{
		{"PUT /latest/api/token", http.Header{"User-Agent": {"imdsgate"}, "Content-Length": {"0"}, tokenTTLHeader: {"21600"}}},
		{"GET " + region, http.Header{"User-Agent": {"imdsgate"}, tokenHeader: {"node-token-1"}}},
	} {
		r := requests[i]
		if got := r.Method + " " + r.RequestURI; got != want.line {
			t.Errorf("%s, want %s", got, want.line)
		}
		if d := cmp.Diff(want.header, r.Header); d != "" {
			t.Error(want.line, d)
		}
		if r.Host != l.real.addr || r.ContentLength != 0 {
			t.Errorf("Host %q, %d bytes", r.Host, r.ContentLength)
		}
	}
}

func TestPassthroughFailures(t *testing.T) {
	for name, tc := range map[string]struct {
		answer http.HandlerFunc
		want   int
	}{
		"not found": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) }, 404},
		"error":     {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, 503},
		"throttled": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(429) }, 503},
		"redirect": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "/latest/user-data")
			w.WriteHeader(302)
		}, 503},
		"no token":    {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }, 503},
		"too long":    {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, upstreamMax+1)) }, 503},
		"long enough": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, upstreamMax)) }, 200},
		"empty":       {func(http.ResponseWriter, *http.Request) {}, 200},
		"never":       {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, 503},
		"cut off": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "9")
			_, _ = w.Write([]byte("x"))
		}, 503},
		"never a body": {func(w http.ResponseWriter, r *http.Request) { w.(http.Flusher).Flush(); <-r.Context().Done() }, 503},
	} {
		onTime(t, name, func() bool {
			l := newLab(t)
			l.real.set(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPut {
					_, _ = io.WriteString(w, "node-token")
					return
				}
				tc.answer(w, r)
			})
			r := l.get(t, "role", region)
			late := r.elapsed > 450*time.Millisecond
			if r.StatusCode != tc.want && !(late && r.StatusCode == 503) {
				t.Errorf("%s: %d after %v", name, r.StatusCode, r.elapsed)
			}
			for _, up := range l.real.requests() {
				if up.Method == http.MethodGet && up.RequestURI != region {
					t.Errorf("%s: %s was asked for", name, up.RequestURI)
				}
			}
			return late && tc.want != 503 || r.elapsed > 450*time.Millisecond+slack
		})
	}
	for name, answer := range map[string]http.HandlerFunc{
		"token refused": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) },
		"token empty":   func(http.ResponseWriter, *http.Request) {},
		"token invalid": func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "a\nb: c") },
	} {
		l := newLab(t)
		l.real.set(answer)
		if r := l.get(t, "role", region); r.StatusCode != 503 {
			t.Errorf("%s: %d", name, r.StatusCode)
		}
	}
}

// A value is served for a minute from memory, asked for once by whoever comes then, and kept while there is no answer.
func TestPassthroughIsCached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		real := &scripted{answers: map[string]string{"/latest/api/token": "t1", region: "one"}}
		u, err := newUpstream("127.0.0.1", 300*time.Millisecond, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		u.client.Transport = real
		e := &entry{path: region}
		check := func(want string, wantCalls int) {
			t.Helper()
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), 450*time.Millisecond)
					defer cancel()
					start := time.Now()
					body, err := u.get(ctx, e)
					if err != nil {
						body = []byte(err.Error())
					}
					if string(body) != want || time.Since(start) > 300*time.Millisecond {
						t.Errorf("%q after %v, want %q", body, time.Since(start), want)
					}
				})
			}
			wg.Wait()
			if n := real.calls[region]; n != wantCalls {
				t.Errorf("asked %d times, want %d", n, wantCalls)
			}
		}
		check("one", 1)
		real.set(region, "two")
		time.Sleep(59 * time.Second)
		check("one", 1)
		time.Sleep(time.Second)
		check("two", 2)
		real.set(region, "hang")
		time.Sleep(time.Minute)
		check("two", 3) // after the timeout
		check("two", 3) // at once
		time.Sleep(time.Second)
		check("two", 4)
		real.set(region, "three")
		time.Sleep(time.Second)
		check("three", 5)
		real.set(region, "404")
		time.Sleep(time.Minute)
		check(errAbsent.Error(), 6)
		if n := real.calls["/latest/api/token"]; n != 1 {
			t.Errorf("%d tokens", n)
		}
		real.set("/latest/api/token", "t2") // what was issued before is refused
		real.set(region, "four")
		time.Sleep(time.Minute)
		check("four", 8)
		if n := real.calls["/latest/api/token"]; n != 2 {
			t.Errorf("%d tokens", n)
		}
		time.Sleep(upstreamTTL / 2)
		check("four", 9)
		if n := real.calls["/latest/api/token"]; n != 3 {
			t.Errorf("%d tokens after half their life", n)
		}
	})
}

// scripted is a transport, for tests in fake time.
type scripted struct {
	mu      sync.Mutex
	answers map[string]string
	calls   map[string]int
}

func (s *scripted) set(path, answer string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answers[path] = answer
}

func (s *scripted) RoundTrip(r *http.Request) (*http.Response, error) {
	s.mu.Lock()
	if s.calls == nil {
		s.calls = map[string]int{}
	}
	s.calls[r.URL.Path]++
	answer, token := s.answers[r.URL.Path], s.answers["/latest/api/token"]
	s.mu.Unlock()
	code := http.StatusOK
	switch {
	case answer == "hang":
		<-r.Context().Done()
		return nil, r.Context().Err()
	case answer == "404":
		code = http.StatusNotFound
	case r.Method == http.MethodGet && r.Header.Get(tokenHeader) != token:
		code = http.StatusUnauthorized
	}
	return &http.Response{StatusCode: code, Body: io.NopCloser(strings.NewReader(answer)), Request: r}, nil
}

// A pod that invents MAC addresses makes neither memory grow nor requests to the real endpoint.
func TestMACsAreBounded(t *testing.T) {
	l := newLab(t, func(o *Options) { o.Allow = []string{"network/interfaces/macs/{mac}/vpc-id"} })
	for i := range 300 {
		l.get(t, "role", fmt.Sprintf("%s0a:00:00:00:%02x:%02x/vpc-id", macList, 1+i/256, i%256))
	}
	if r := l.get(t, "role", macList+"0a:00:00:00:00:01/vpc-id"); r.body != "vpc-1" {
		t.Errorf("%d %s", r.StatusCode, r.body)
	}
	if n := len(l.real.requests()); n != 3 {
		t.Errorf("%d requests went to the real endpoint", n)
	}
	m := &macEntries{entries: map[string]*entry{}}
	for i := range 1000 {
		m.entry(fmt.Sprint(i))
	}
	if len(m.entries) > maxMACs {
		t.Errorf("%d entries", len(m.entries))
	}
}

func TestValidateAllow(t *testing.T) {
	good := map[string]string{
		"tags/instance/Name":                          "/latest/meta-data/tags/instance/Name",
		"tags/instance/Name/":                         "/latest/meta-data/tags/instance/Name",
		"/latest/meta-data/placement/host-id":         "/latest/meta-data/placement/host-id",
		"meta-data/placement/host-id":                 "/latest/meta-data/placement/host-id",
		"dynamic/instance-identity/document":          "/latest/dynamic/instance-identity/document",
		"/latest/dynamic/instance-identity/document/": "/latest/dynamic/instance-identity/document",
		"network/interfaces/macs/{mac}/subnet-id":     "/latest/meta-data/network/interfaces/macs/{mac}/subnet-id",
		"network/interfaces/macs":                     "/latest/meta-data/network/interfaces/macs",
		"network/interfaces/macs/{mac}":               "/latest/meta-data/network/interfaces/macs/{mac}",
		"spot/instance-action":                        "/latest/meta-data/spot/instance-action",
		"tags/instance/a:b@c=d+e,f":                   "/latest/meta-data/tags/instance/a:b@c=d+e,f",
	}
	for allow, want := range good {
		if got, err := canonicalAllow(allow); err != nil || got != want {
			t.Errorf("%s: %s, %v", allow, got, err)
		}
	}
	if err := ValidateAllow(slices.Collect(maps.Keys(good))); err != nil {
		t.Error(err)
	}
	bad := []string{
		"", "/", "//", ".", "..", "latest", "/latest/", "/latest", "meta-data/", "dynamic/", "meta-data", "a//b", "a/./b", "a/../b", "a b", "a%2fb", "a?b", "a#b", "a;b",
		"a\\b", "a\x00b", "a\nb", "ä", "*", "tags/*", "^.*$", "tags/instance/{tag}", "{mac}", "tags/{mac}", "network/interfaces/macs/{mac}x/vpc-id",
		"network/interfaces/macs/{mac}/{mac}", "network/interfaces/macs/x{mac}", "network/interfaces/macs/{MAC}/vpc-id", "a//", "//a",
		"iam", "iam/", "iam/info", "/latest/meta-data/iam/security-credentials/", "IAM/info", "Iam/security-credentials/x", "%69am/info", "iam%2finfo", "./iam/info", "x/../iam/info", "/iam/info",
		"meta-data/iam/info", "latest/meta-data/iam/info", "//latest/meta-data/iam/info", "http://169.254.169.254/latest/meta-data/iam/info",
		"identity-credentials", "identity-credentials/ec2/info", "Identity-Credentials/ec2/security-credentials/ec2-instance",
		"user-data", "/latest/user-data", "/latest/user-data/", "USER-DATA", "latest/user-data", "/user-data", "../user-data", "/2016-09-02/user-data",
		"dynamic/instance-identity/pkcs7", "dynamic/instance-identity/signature/", "/latest/dynamic/instance-identity/RSA2048", "dynamic/instance-identity/PKCS7",
		"/2016-09-02/meta-data/iam/info", "/1.0/user-data",
	}
	for _, allow := range bad {
		if got, err := canonicalAllow(allow); err == nil {
			t.Errorf("%q is %s", allow, got)
		}
		if _, err := NewServer(Options{Callers: newCallers(), Credentials: noCredentials{}, TokenKey: make([]byte, 32), Allow: []string{allow}}); err == nil {
			t.Errorf("%q: NewServer takes it", allow)
		}
	}
	if err := ValidateAllow([]string{"mac", "iam/", "user-data"}); err == nil || !strings.Contains(err.Error(), `"iam/"`) || !strings.Contains(err.Error(), `"user-data"`) {
		t.Error(err)
	}
}
