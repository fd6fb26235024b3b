package proxy

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// conformance is testdata/conformance.json; its "about" explains the fields. The cluster tests replay the same file.
type conformance struct{ Rows []conformanceRow }

type conformanceRow struct {
	ID, About, Pod, Setting, Request, Then string
	Answers                                []struct {
		Status  []int
		Headers map[string]string
		Absent  []string
		Body    string
	}
	WithinMS              int `json:"within_ms"`
	Credentials, Upstream bool
}

func TestConformance(t *testing.T) {
	data, err := os.ReadFile("testdata/conformance.json")
	if err != nil {
		t.Fatal(err)
	}
	var table conformance
	if err := json.Unmarshal(data, &table); err != nil {
		t.Fatal(err)
	}
	labs := map[string]*lab{
		"":              newLab(t),
		"v2-only":       newLab(t, func(o *Options) { o.IMDSv1 = false }),
		"upstream-down": newLab(t, func(o *Options) { o.MetadataAddr = "127.0.0.1:1" }),
	}
	for _, l := range labs {
		l.warm(t, "role", "other", "special")
	}
	for _, row := range table.Rows {
		t.Run(row.ID, func(t *testing.T) {
			if row.WithinMS > 0 {
				t.Parallel() // it may be held
			}
			l := labs[row.Setting]
			if l == nil {
				t.Fatalf("no such setting: %q", row.Setting)
			}
			if row.Pod == "" {
				row.Pod = "role"
			}
			onTime(t, row.About, func() bool { return l.conforms(t, row) })
		})
	}
}

// conforms sends a row's request and checks the answers. It reports whether they came late.
func (l *lab) conforms(t *testing.T, row conformanceRow) (late bool) {
	t.Helper()
	fill := l.placeholders(t, row.Pod, row.Request)
	upstream := len(l.real.requests())
	c := dial(t, l.addr, podIPs[row.Pod])
	request := latin1(fill(row.Request))
	start := time.Now()
	go func() { _, _ = io.WriteString(c, request) }() // may be answered and closed before all of it is read
	br := bufio.NewReader(c)
	method, _, _ := strings.Cut(request, " ")
	within := 250 * time.Millisecond
	if row.WithinMS > 0 {
		within = time.Duration(row.WithinMS) * time.Millisecond
	}
	for i, want := range row.Answers {
		r, err := readReply(br, method)
		if err != nil {
			t.Fatalf("%s: answer %d: %v", row.About, i+1, err)
		}
		late = late || time.Since(start) > within+slack
		if !slices.Contains(want.Status, r.StatusCode) {
			t.Errorf("%s: status %d, want %v; %s", row.About, r.StatusCode, want.Status, r.body)
		}
		for name, pattern := range want.Headers {
			if v := r.Header.Get(name); !regexp.MustCompile(pattern).MatchString(v) {
				t.Errorf("%s is %q, want %s", name, v, pattern)
			}
		}
		for _, name := range want.Absent {
			if r.Header.Get(name) != "" {
				t.Errorf("%s is there", name)
			}
		}
		if !regexp.MustCompile(fill(want.Body)).MatchString(r.body) {
			t.Errorf("body is %q, want %s", r.body, want.Body)
		}
		checkAnswer(t, r, row.Pod, row.Credentials)
	}
	checkThen(t, c, br, row.Then)
	if n := len(l.real.requests()) - upstream; n > 0 && !row.Upstream {
		t.Errorf("the real endpoint has seen %d requests", n)
	}
	return late
}

// checkAnswer checks what holds for every answer to the pod.
func checkAnswer(t *testing.T, r *reply, pod string, credentials bool) {
	t.Helper()
	if n, err := strconv.Atoi(r.Header.Get("Content-Length")); err != nil || r.Request.Method != http.MethodHead && n != len(r.body) {
		t.Errorf("Content-Length %q of %d bytes", r.Header.Get("Content-Length"), len(r.body))
	}
	if len(r.TransferEncoding) > 0 {
		t.Errorf("Transfer-Encoding: %v", r.TransferEncoding)
	}
	if r.Header.Get("Server") != "EC2ws" {
		t.Errorf("Server: %q", r.Header.Get("Server"))
	}
	if r.Header.Get("Content-Type") != "text/plain" {
		t.Errorf("Content-Type: %q", r.Header.Get("Content-Type"))
	}
	if r.StatusCode/100 == 3 {
		t.Errorf("redirect to %q", r.Header.Get("Location"))
	}
	if r.StatusCode != http.StatusOK && r.body != "" && (!strings.Contains(r.body, " ") || json.Valid([]byte(r.body))) {
		t.Errorf("body of an error: %q", r.body)
	}
	if r.StatusCode == http.StatusMethodNotAllowed && r.Header.Get("Allow") == "" {
		t.Error("405 without Allow")
	}
	own := "SECRET-of-" + map[string]string{"role": "my-role", "special": "my+role=,.@-_x", "other": "other-role", "short": "short"}[pod]
	rest := r.body
	if credentials {
		rest = strings.Replace(rest, `"`+own+`"`, "", 1)
	}
	for _, mark := range []string{"SECRET", "node-token", "node-role", "a-secret", "b-secret", "c-secret"} {
		if strings.Contains(rest, mark) {
			t.Errorf("the answer holds %q: %s", mark, r.body)
		}
	}
}

// checkThen checks whether the connection goes on.
func checkThen(t *testing.T, c net.Conn, br *bufio.Reader, then string) {
	t.Helper()
	switch then {
	case "":
	case "closed":
		if rest, err := io.ReadAll(br); len(rest) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("not closed: %q, %v", rest, err)
		}
	case "open":
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		r, err := readReply(br, "GET")
		if err != nil || r.body != "latest" {
			t.Errorf("the connection does not go on: %v", err)
		}
	default:
		t.Fatalf("then: %q", then)
	}
}

var repeated = regexp.MustCompile(`\{([xh])\*(\d+)\}`)

// placeholders returns what fills in those of the table.
func (l *lab) placeholders(t *testing.T, pod, request string) func(string) string {
	t.Helper()
	pairs := []string{"{B}", roleList}
	if c, err := l.callers.Find(podIPs[pod]); err == nil && c.Grant != nil {
		pairs = append(pairs, "{role}", c.Grant.Role, "{path}", c.Grant.Path, "{arn}", c.Grant.Key.RoleARN,
			"{escaped-arn}", url.QueryEscape(c.Grant.Key.RoleARN))
	}
	if strings.Contains(request, "token") {
		token := l.token(t, pod, "60")
		pairs = append(pairs, "{token}", token, "{short-token}", token[:len(token)-1], "{upper-token}", strings.ToUpper(token),
			"{token-of-other}", l.token(t, "other", "60"))
	}
	if strings.Contains(request, "{expired-token}") {
		old := l.tokens.issue(podIPs[pod], time.Now().Add(-time.Minute), 59*time.Second)
		pairs = append(pairs, "{expired-token}", old)
	}
	replace := strings.NewReplacer(pairs...).Replace
	return func(s string) string {
		return repeated.ReplaceAllStringFunc(replace(s), func(m string) string {
			p := repeated.FindStringSubmatch(m)
			n, _ := strconv.Atoi(p[2])
			if p[1] == "x" {
				return strings.Repeat("x", n)
			}
			var b strings.Builder
			for i := range n {
				fmt.Fprintf(&b, "\r\nX-%d: %d", i, i)
			}
			return "X-H: h" + b.String()
		})
	}
}

func latin1(s string) string {
	b := make([]byte, 0, len(s))
	for _, r := range s {
		b = append(b, byte(r))
	}
	return string(b)
}
