package proxy

import (
	"bytes"
	"context"
	"io"
	"log"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/imdsgate/imdsgate/cache"
)

// table is what the default table serves, written down a second time.
var table = map[string]bool{
	"/": true, roleList: true, roleList + "/": true, metaData + "iam/info": true, metaData + "iam/info/": true,
	roleList + "/my-role": true, roleList + "/my-role/": true, roleList + "/team/my-role": true, roleList + "/team/my-role/": true,
	roleList + "/" + testRoleARN + "team/my-role": true, roleList + "/" + testRoleARN + "team/my-role/": true,
}

func inTable(path string) bool {
	for _, p := range passthrough() {
		if path == metaData+p || path == metaData+p+"/" {
			return true
		}
	}
	return table[path]
}

// Every small change of a path that is served is not found, and makes nobody ask the real endpoint.
func TestPathMutations(t *testing.T) {
	l := newLab(t)
	l.warm(t, "role")
	h := l.Handler()
	seen, served := 0, 0
	for path := range table {
		for i := range len(path) {
			for _, m := range []string{
				path[:i] + path[i+1:], path[:i] + "/" + path[i:], path[:i] + "%" + path[i:], path[:i] + "../" + path[i:], path[:i] + "./" + path[i:],
				path[:i] + "%2f" + path[i:], path[:i] + "%2e%2e/" + path[i:], path[:i] + ";" + path[i:], path[:i] + "\\" + path[i:], path[:i] + "%00" + path[i:],
				path[:i] + strings.ToUpper(path[i:i+1]) + path[i+1:], path[:i] + "#" + path[i:], path[:i] + "%25" + path[i:], path[:i] + "é" + path[i:],
			} {
				seen++
				r := &http.Request{Method: http.MethodGet, RequestURI: m, Host: MetadataIPv4, ProtoMajor: 1, ProtoMinor: 1, RemoteAddr: "127.0.0.2:1", Header: http.Header{}}
				w := &sink{header: http.Header{}}
				h.ServeHTTP(w, r)
				if w.code == 200 {
					served++
				}
				if want := inTable(m); want != (w.code == 200) || !want && w.code != 404 {
					// One escaped slash or letter in the role's own name is the role's own name.
					if name, ok := strings.CutPrefix(m, roleList+"/"); ok && strings.Contains(name, "%") && w.code == 200 && l.ownName(name) {
						continue
					}
					t.Errorf("%s: %d", m, w.code)
				}
			}
		}
	}
	if n := len(l.real.requests()); n > 0 || served == 0 || seen < 1000 {
		t.Errorf("%d paths, %d served, %d requests to the real endpoint", seen, served, n)
	}
}

func (l *lab) ownName(name string) bool {
	c, err := l.callers.Find(podIPs["role"])
	return err == nil && c.Grant.named(name)
}

func TestNamed(t *testing.T) {
	g := grant("team/my-role")
	for name, want := range map[string]bool{
		"my-role": true, "my-role/": true, "team/my-role": true, "team/my-role/": true, testRoleARN + "team/my-role": true, "my%2drole": true,
		"team%2Fmy-role": true, "my-role%2f": true,
		"": false, "/": false, "%2f": false, "my-role//": false, "/my-role": false, "my%252drole": false, "my-role%": false, "my-role%zz": false, "my-role%00": false,
		"team": false, "team/": false, "other/my-role": false, "MY-ROLE": false, "my-role ": false, "my-role%20": false, "role/team/my-role": false,
		"arn:aws:iam::123456789012:role/my-role": false,
	} {
		if got := g.named(name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
	if (&Grant{}).named("") || (&Grant{}).named("/") {
		t.Error("an empty grant has a name")
	}
}

// recorder is a transport that counts what goes to the real endpoint and is not in the table.
type recorder struct{ outside, all atomic.Int64 }

func (c *recorder) RoundTrip(r *http.Request) (*http.Response, error) {
	c.all.Add(1)
	token := r.Method == http.MethodPut && r.URL.Path == "/latest/api/token"
	if uri := r.URL.RequestURI(); !token && (r.Method != http.MethodGet || !inTable(uri) || !strings.HasPrefix(uri, metaData) || strings.Contains(uri, "iam")) {
		c.outside.Add(1)
	}
	return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader("node")), Request: r}, nil
}

// FuzzRoute sends whole requests of one pod, among others, over a connection with everything in place: whatever they are,
// nothing outside the table is asked of the real endpoint, nobody gets another's credentials, nothing is a redirect, and
// only paths of the table are served.
func FuzzRoute(f *testing.F) {
	for _, s := range []string{
		"GET|/latest/meta-data/iam/security-credentials/|", "GET|/latest/meta-data/iam/security-credentials/my-role|", "PUT|/latest/api/token|" + tokenTTLHeader + ": 60",
		"GET|/latest/meta-data/iam/security-credentials/other-role|", "GET|/latest/meta-data/iam/security-credentials/team%2Fmy-role/|X-Forwarded-For: 127.0.0.3",
		"GET|http://169.254.169.254/latest/meta-data/placement/region|", "GET|/latest/meta-data/placement/region/../../../user-data|", "HEAD|/latest/meta-data/mac/|",
		"GET|http://169.254.169.254|", "GET|//latest/user-data|", "GET|/latest/meta-data/iam%2fsecurity-credentials/my-role|", "OPTIONS|*|", "CONNECT|169.254.169.254:80|", "get|/|",
		"GET|/latest/meta-data/iam/security-credentials/arn:aws:iam::123456789012:role/team/my-role|", "GET|/|X-Aws-Ec2-Metadata-Token: x", "GET|/?|Content-Length: 5",
		"GET|/latest/meta-data/network/interfaces/macs/0a:00:00:00:00:01/vpc-id|", "GET|/\x00|", "GET|/%zz|", "GET|/\xff|", "GET|/latest/meta-data/iam/info|Host: x",
		"GET|http://|", "GET|http:///|", "GET|http://[fd00:ec2::254]/|", "GET|http://x@169.254.169.254/|", "GET|http:169.254.169.254/|",
	} {
		p := strings.SplitN(s, "|", 3)
		f.Add(p[0], p[1], p[2])
	}
	own, others := grant("team/my-role"), grant("other-role")
	creds := issuedBy(f, own, others)
	callers := newCallers()
	callers.set(podIPs["role"], caller("role", own, nil), nil)
	callers.set(podIPs["other"], caller("other", others, nil), nil)
	s, err := NewServer(Options{
		Callers: callers, Credentials: perKey{own.Key.RoleARN: creds[0], others.Key.RoleARN: creds[1]}, TokenKey: bytes.Repeat([]byte("k"), 32), IMDSv1: true, Hold: time.Millisecond, MetadataAddr: "127.0.0.1:1",
	})
	if err != nil {
		f.Fatal(err)
	}
	up := &recorder{}
	s.upstream.client.Transport = up
	f.Fuzz(func(t *testing.T, method, target, header string) {
		in := method + " " + target + " HTTP/1.1\r\nHost: 169.254.169.254\r\n" + header + "\r\n\r\n"
		conn := newFed([]byte(in), 1<<20)
		synctest.Test(t, func(*testing.T) { // net/http sleeps before it closes on what it cannot read
			conn.closed = make(chan struct{})
			hs := &http.Server{Handler: s.Handler(), ConnContext: withPeer, ErrorLog: log.New(io.Discard, "", 0), DisableGeneralOptionsHandler: true}
			defer hs.Close()
			_ = hs.Serve(&oneConn{conn: conn, done: conn.closed})
			<-conn.closed
		})
		out := conn.out.String()
		if strings.Contains(out, secretOf("other-role")) {
			t.Errorf("%q: another's credentials: %q", in, out)
		}
		if n := up.outside.Load(); n > 0 {
			t.Fatalf("%q: %d requests outside the table", in, n)
		}
		if strings.HasPrefix(out, "HTTP/1.1 3") || strings.Contains(out, "\r\nLocation:") {
			t.Errorf("%q: redirect: %q", in, out)
		}
		if strings.ContainsAny(method+target+header, "\r\n ") || !strings.HasPrefix(out, "HTTP/1.1 200 ") {
			return // more than one request, or none
		}
		path, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(target, "http://169.254.169.254:80"), "http://169.254.169.254"), "?")
		name, isDocument := strings.CutPrefix(path, roleList+"/")
		switch {
		case method == http.MethodPut && path == "/latest/api/token":
		case method != http.MethodGet && method != http.MethodHead:
			t.Errorf("%q is answered %q", in, out)
		case path == "" && strings.HasPrefix(target, "http://"), inTable(path), isDocument && own.named(name):
		case strings.HasPrefix(target, "http://[fd00:ec2::254]"):
		default:
			t.Errorf("%q is answered %q", in, out)
		}
	})
}

// perKey has credentials by role ARN.
type perKey map[string]*cache.Credentials

func (p perKey) Peek(key *cache.Key, _ *cache.Ref, _ time.Time) *cache.Credentials {
	return p[key.RoleARN]
}
func (p perKey) Get(_ context.Context, key cache.Key) (*cache.Credentials, error) {
	return p[key.RoleARN], nil
}
