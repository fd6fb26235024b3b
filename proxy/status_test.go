package proxy

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/imdsgate/imdsgate/cache"
)

func TestStatus(t *testing.T) {
	secret := "pods a-secret/x and b-secret/y"
	m, err := newMetrics(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []*fault{
		errHost, errMethod, errPath, errForwarded, errTTL, errToken, errNoToken, errFlood, errOtherRole, errUndecided, errAbsent, errUpstream,
	} {
		code, reason, text := status(f)
		if m.requests[handlerOther][code] == nil || m.denied[reason] == nil && code != 503 && f != errAbsent || !strings.Contains(text, " ") {
			t.Errorf("%d %s %q", code, reason, text)
		}
	}
	for _, tc := range []struct {
		err    error
		code   int
		reason string
		text   string
	}{
		{&Refusal{Kind: NoRole, Text: "service account a/b has no annotation"}, 404, reasonNoRole, "service account a/b has no annotation"},
		{&Refusal{Kind: Denied, Text: "not permitted here"}, 403, reasonDenied, "not permitted here"},
		{&Refusal{Kind: Invalid, Text: "not an ARN"}, 403, reasonInvalid, "not an ARN"},
		{&Refusal{Kind: 99, Text: "whatever it is"}, 403, reasonInvalid, "whatever it is"},
		{&Refusal{Kind: NoRole, Text: "word"}, 404, reasonNoRole, "refused: word"},
		{&Refusal{Kind: NoRole}, 404, reasonNoRole, "refused: "},
		{&Refusal{Kind: NoRole, Text: `{"Code": "Success"}`}, 404, reasonNoRole, `refused: {"Code": "Success"}`},
		{&Refusal{Kind: NoRole, Text: "two\r\nlines\x00\u0085"}, 404, reasonNoRole, "two  lines"},
		{&Refusal{Kind: NoRole, Text: strings.Repeat("é ", 4096)}, 404, reasonNoRole, ""},
		{&cache.IssueError{Denied: true, Code: "AccessDenied", Err: errors.New("STS refused"), Hint: "add sts:TagSession"}, 403, reasonCredentials, "STS refused; fix: add sts:TagSession"},
		{fmt.Errorf("%w: %w", cache.ErrUnavailable, &cache.IssueError{Err: errors.New("dial 10.0.0.1: " + secret)}), 503, reasonUnavailable, "no credentials available yet, ask again; the log of this node's imdsgate says why"},
		{fmt.Errorf("%w: %w", cache.ErrUnavailable, &cache.IssueError{Code: "Throttling", Err: errors.New(secret)}), 503, reasonUnavailable, "no credentials available yet, STS answered Throttling, ask again"},
		{cache.ErrUnavailable, 503, reasonUnavailable, "no credentials available yet, ask again"},
		{fmt.Errorf("%s: %w", secret, ErrNotSynced), 503, reasonNotSynced, ""},
		{fmt.Errorf("%s: %w", secret, ErrUnknownIP), 503, reasonUnknownIP, ""},
		{fmt.Errorf("%s: %w", secret, ErrAmbiguousIP), 503, reasonAmbiguous, ""},
		{fmt.Errorf("%s: %w", secret, ErrIncomplete), 503, reasonIncomplete, ""},
		{context.DeadlineExceeded, 503, reasonIdentify, ""},
		{errors.New(secret), 503, reasonIdentify, ""},
	} {
		code, reason, text := status(tc.err)
		if m.requests[handlerOther][code] == nil {
			t.Errorf("%d is not counted", code)
		}
		if code != tc.code || reason != tc.reason || tc.text != "" && text != tc.text {
			t.Errorf("%v: %d %s %q", tc.err, code, reason, text)
		}
		if !strings.Contains(text, " ") || strings.Contains(text, "secret") || len(text) > 1100 || strings.ContainsFunc(text, unicode.IsControl) {
			t.Errorf("%v: %q", tc.err, text)
		}
	}
}

func TestMetricsLint(t *testing.T) {
	reg := prometheus.NewRegistry()
	m, err := newMetrics(reg)
	if err != nil {
		t.Fatal(err)
	}
	m.observe(handlerToken, 200, 1)
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
	if _, err := newMetrics(reg); err == nil {
		t.Error("registered twice without an error")
	}
}

// Whatever clients invent makes no series.
func TestSeriesAreFixed(t *testing.T) {
	l := newLab(t)
	l.warm(t, "role")
	count := func() int {
		n, err := testutil.GatherAndCount(l.metrics)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := count()
	for i := range 100 {
		l.ask(t, "role", fmt.Sprintf("M%d /p%d HTTP/1.1\r\n%s\r\n", i, i, hostLine))
		l.ask(t, "role", fmt.Sprintf("GET /p%d?%d HTTP/1.1\r\n%sX-%d: y\r\n\r\n", i, i, hostLine, i))
		l.get(t, "role", fmt.Sprintf("%s/role-%d", roleList, i))
		l.ask(t, "role", fmt.Sprintf("GET / HTTP/1.1\r\nHost: h%d\r\n\r\n", i))
	}
	for pod := range podIPs {
		l.get(t, pod, roleList+"/", tokenHeader+": x")
	}
	if after := count(); after != before {
		t.Errorf("%d series, then %d", before, after)
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.warm(t, "role")
	l.get(t, "role", roleList+"/my-role")
	l.get(t, "role", roleList+"/my-role")
	l.get(t, "role", roleList+"/other")
	l.get(t, "role", "/nothing")
	l.get(t, "no-role", roleList+"/")
	l.get(t, "unknown", roleList+"/")
	l.ask(t, "role", "GET / HTTP/1.1\r\nHost: evil\r\n\r\n")
	l.token(t, "role", "60")
	for metric, want := range map[prometheus.Collector]float64{
		l.Server.metrics.requests[handlerDocument][200]:      2,
		l.Server.metrics.requests[handlerDocument][404]:      1,
		l.Server.metrics.requests[handlerOther][404]:         1,
		l.Server.metrics.requests[handlerRoleList][404]:      1,
		l.Server.metrics.requests[handlerRoleList][503]:      1,
		l.Server.metrics.requests[handlerRoot][403]:          1,
		l.Server.metrics.requests[handlerToken][200]:         1,
		l.Server.metrics.denied[reasonOtherRole]:             1,
		l.Server.metrics.denied[reasonPath]:                  1,
		l.Server.metrics.denied[reasonNoRole]:                1,
		l.Server.metrics.denied[reasonHost]:                  1,
		l.Server.metrics.identifyFailures[reasonUnknownIP]:   1,
		l.Server.metrics.identifyWait.(prometheus.Collector): 1,
	} {
		eventually(t, func() bool { // counted after the answer was written
			if h, ok := metric.(prometheus.Histogram); ok {
				return testutil.CollectAndCount(h) == int(want)
			}
			return testutil.ToFloat64(metric) == want
		})
	}
}
