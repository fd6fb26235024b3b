package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fakeKube has one pod on node n1, at 127.0.0.1, with its service account and namespace.
func fakeKube(t *testing.T) *httptest.Server {
	objects := map[string]string{
		"/api/v1/pods": `{"apiVersion":"v1","kind":"Pod","metadata":{"namespace":"shop","name":"cart-1","uid":"u1","resourceVersion":"1"},
			"spec":{"nodeName":"n1","serviceAccountName":"cart","containers":[{"name":"c","image":"i"}]},
			"status":{"phase":"Running","podIP":"127.0.0.1","podIPs":[{"ip":"127.0.0.1"}],"startTime":"2020-01-01T00:00:00Z"}}`,
		"/api/v1/namespaces/shop/serviceaccounts": `{"apiVersion":"v1","kind":"ServiceAccount","metadata":{"namespace":"shop","name":"cart","uid":"u2","resourceVersion":"1",
			"annotations":{"eks.amazonaws.com/role-arn":"arn:aws:iam::123456789012:role/team/my-role"}}}`,
		"/api/v1/namespaces": `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"shop","uid":"u3","resourceVersion":"1",
			"annotations":{"iam.amazonaws.com/allowed-roles":"[\"arn:aws:iam::123456789012:role/team/*\"]"}}}`,
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		object, ok := objects[r.URL.Path]
		if !ok {
			http.NotFound(w, r)
			return
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, []byte(object)); err != nil {
			t.Error(err)
		}
		w.Header().Set("Content-Type", "application/json")
		q := r.URL.Query()
		if q.Get("watch") == "" {
			var kind struct{ Kind string }
			_ = json.Unmarshal([]byte(object), &kind)
			fmt.Fprintf(w, `{"apiVersion":"v1","kind":"%sList","metadata":{"resourceVersion":"1"},"items":[%s]}`, kind.Kind, &compact)
			return
		}
		if q.Get("sendInitialEvents") == "true" {
			var kind struct{ Kind string }
			_ = json.Unmarshal([]byte(object), &kind)
			fmt.Fprintf(w, `{"type":"ADDED","object":%s}`+"\n", &compact)
			fmt.Fprintf(w, `{"type":"BOOKMARK","object":{"apiVersion":"v1","kind":"%s","metadata":{"resourceVersion":"1","annotations":{"k8s.io/initial-events-end":"true"}}}}`+"\n", kind.Kind)
		}
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	return s
}

func fakeSTS(t *testing.T) *httptest.Server {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/xml")
		fmt.Fprintf(w, `<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>
			<AccessKeyId>ASIAEXAMPLE</AccessKeyId><SecretAccessKey>hush-secret</SecretAccessKey><SessionToken>hush-token</SessionToken>
			<Expiration>%s</Expiration></Credentials></AssumeRoleResult><ResponseMetadata><RequestId>r-1</RequestId></ResponseMetadata></AssumeRoleResponse>`,
			time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	}))
	t.Cleanup(s.Close)
	return s
}

// logBuffer is written by the daemon while the test reads it.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestServe runs the whole command on loopback, without rules, against an API server and an STS that say the least they can:
// start, ready, credentials, metrics, status page, probe, and an end that drains.
func TestServe(t *testing.T) {
	kube, sts := fakeKube(t), fakeSTS(t)
	for k, v := range map[string]string{
		"AWS_EC2_METADATA_DISABLED": "true", "AWS_REGION": "eu-west-1", "AWS_ENDPOINT_URL_STS": sts.URL, "AWS_CA_BUNDLE": "",
		"AWS_ACCESS_KEY_ID": "AKIANODE", "AWS_SECRET_ACCESS_KEY": "node-secret", "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
	} {
		t.Setenv(k, v)
	}
	dir := t.TempDir()
	kubeconfig := filepath.Join(dir, "kubeconfig")
	if err := os.WriteFile(kubeconfig, fmt.Appendf(nil, `{"apiVersion":"v1","kind":"Config","clusters":[{"name":"c","cluster":{"server":%q}}],"contexts":[{"name":"x","context":{"cluster":"c"}}],"current-context":"x"}`, kube.URL), 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "probe", "s")
	port, ops, debug := freePort(t), freePort(t), freePort(t)
	args := []string{
		"-node=n1", "-host-ip=127.0.0.1", "-guard=false", "-redirect=none", "-kubeconfig=" + kubeconfig, "-probe-socket=" + socket,
		fmt.Sprintf("-port=%d", port), fmt.Sprintf("-ops-addr=127.0.0.1:%d", ops), fmt.Sprintf("-debug-addr=127.0.0.1:%d", debug),
		"-state-dir=" + filepath.Join(dir, "state"),
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var log logBuffer
	done := make(chan error, 1)
	go func() { done <- run(ctx, args, env(), &log, &log) }()

	probed := func() error {
		return probe(t.Context(), &Config{ProbeSocket: socket}, io.Discard)
	}
	for deadline := time.Now().Add(20 * time.Second); probed() != nil; time.Sleep(10 * time.Millisecond) {
		select {
		case err := <-done:
			t.Fatalf("ended early: %v\n%s", err, &log)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("never ready: %v\n%s", probed(), &log)
		}
	}
	base := fmt.Sprintf("http://127.0.0.1:%d", port)
	get := func(url, host string) (int, string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Host = host
		resp, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	const list = "/latest/meta-data/iam/security-credentials/"
	if code, body := get(base+list, "169.254.169.254"); code != 200 || body != "my-role" {
		t.Fatalf("role list: %d %q\n%s", code, body, &log)
	}
	if code, body := get(base+list+"my-role", "169.254.169.254"); code != 200 || !strings.Contains(body, "hush-token") {
		t.Errorf("document: %d %q", code, body)
	}
	opsURL := fmt.Sprintf("http://127.0.0.1:%d", ops)
	for path, want := range map[string]string{
		"/healthz": "ok", "/readyz": "ok",
		"/metrics": `imdsgate_build_info{`,
	} {
		if code, body := get(opsURL+path, ""); code != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %d %q", path, code, body)
		}
	}
	_, metrics := get(opsURL+"/metrics", "")
	debugURL := fmt.Sprintf("http://127.0.0.1:%d", debug)
	_, page := get(debugURL+"/", "")
	_, podsJSON := get(debugURL+"/debug/pods", "")
	for name, text := range map[string]string{"status page": page, "/debug/pods": podsJSON} {
		if !strings.Contains(text, "arn:aws:iam::123456789012:role/team/my-role") {
			t.Errorf("%s does not tell the role:\n%s", name, text)
		}
	}
	if code, _ := get(debugURL+"/debug/pprof/", ""); code != 404 {
		t.Errorf("pprof without -pprof: %d", code)
	}
	for _, path := range []string{"/metrics", "/healthz", "/debug/pods", "/debug/pprof/"} {
		if code, _ := get(base+path, "169.254.169.254"); code != 404 {
			t.Errorf("%s on the pod-facing port: %d", path, code)
		}
	}

	// The drain: what is there is served until the end, which comes by itself.
	stop()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("run: %v", err)
		}
	case <-time.After(15 * time.Second):
		t.Fatal("did not end")
	}
	for name, text := range map[string]string{"log": log.String(), "metrics": metrics, "status page": page, "/debug/pods": podsJSON} {
		for _, secret := range []string{"hush-secret", "hush-token", "node-secret"} {
			if strings.Contains(text, secret) {
				t.Errorf("%s tells a secret", name)
			}
		}
	}
	if probed() == nil {
		t.Error("an ended instance answers probes")
	}
}

// freePort is the first of two ports in a row that nobody has, by either family. They are below those that the kernel gives away:
// whoever listens anywhere or connects meanwhile does not get them.
func freePort(t *testing.T) int {
	t.Helper()
	var last error
search:
	for range 100 {
		port := 20000 + 2*rand.N(5000)
		for _, host := range []string{"127.0.0.1", "::1"} {
			for _, p := range []int{port, port + 1} {
				l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(p)))
				if err != nil {
					last = err
					continue search
				}
				l.Close()
			}
		}
		return port
	}
	t.Fatal(last)
	return 0
}

// TestListen: one port after the other, and no third.
func TestListen(t *testing.T) {
	c, err := parseConfig([]string{"-node=n", "-host-ip=127.0.0.1,::1"}, env(), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	first, second, err := listen(t.Context(), c.HostIPs, port)
	if err != nil || second || len(first) != 2 {
		t.Fatal(first, second, err)
	}
	for _, l := range first {
		raw, err := l.(*net.TCPListener).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var protocol int
		if err := errors.Join(raw.Control(func(fd uintptr) {
			protocol, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PROTOCOL)
		}), err); err != nil || protocol != unix.IPPROTO_TCP {
			t.Errorf("%s listens with protocol %d, not plain TCP: %v", l.Addr(), protocol, err)
		}
	}
	next, second, err := listen(t.Context(), c.HostIPs, port)
	if err != nil || !second || next[0].Addr().(*net.TCPAddr).Port != port+1 {
		t.Fatal(next, second, err)
	}
	if _, _, err := listen(t.Context(), c.HostIPs, port); err == nil || !strings.Contains(err.Error(), "set -port") {
		t.Errorf("both ports taken: %v", err)
	}
	for _, l := range first {
		l.Close()
	}
	again, second, err := listen(t.Context(), c.HostIPs, port)
	if err != nil || !second || again[0].Addr().(*net.TCPAddr).Port != port {
		t.Errorf("the first port is free again, the second is not: %v %v %v", again, second, err)
	}
	for _, l := range append(next, again...) {
		l.Close()
	}
	bad, _ := parseConfig([]string{"-node=n", "-host-ip=203.0.113.7"}, env(), io.Discard)
	if _, _, err := listen(t.Context(), bad.HostIPs, port); err == nil || !strings.Contains(err.Error(), "address of this node") {
		t.Errorf("foreign address: %v", err)
	}
}
