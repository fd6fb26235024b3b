package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/cmd/imdsgate-load/load"
)

const (
	maxBody = 64 << 10
	list    = "/latest/meta-data/iam/security-credentials/"
)

// session is what may be told about credentials.
type session struct {
	role    string
	expires time.Time
}

// ask makes one operation, so that what is wrong is told once and in words, not as ten thousand failures.
func ask(ctx context.Context, o load.Options) (s session, err error) {
	client := &http.Client{
		Timeout:       o.Timeout,
		Transport:     &http.Transport{DisableKeepAlives: true}, // and no proxy, whatever the environment says
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	header := http.Header{}
	get := func(method, path string) (string, error) {
		req, err := http.NewRequestWithContext(ctx, method, "http://"+o.Endpoint.String()+path, nil)
		if err != nil {
			return "", err
		}
		req.Header, req.Host = header.Clone(), "169.254.169.254"
		if o.Endpoint.Addr().Unmap().Is6() && o.Endpoint.Addr().String() == "fd00:ec2::254" {
			req.Host = "[fd00:ec2::254]"
		}
		return exchange(client, req)
	}
	if o.Version != 1 {
		header.Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "21600")
		token, err := get(http.MethodPut, "/latest/api/token")
		if err != nil {
			return s, err
		}
		header = http.Header{"X-Aws-Ec2-Metadata-Token": {token}}
	}
	if s.role = o.Role; s.role == "" {
		roles, err := get(http.MethodGet, list)
		if err != nil {
			return s, err
		}
		s.role, _, _ = strings.Cut(strings.TrimSpace(roles), "\n")
	}
	body, err := get(http.MethodGet, list+s.role)
	if err != nil {
		return s, err
	}
	var document struct {
		Code, AccessKeyID string
		Expiration        time.Time
	}
	// Neither the text nor the error of what is not a document is shown: either may hold a part of one.
	if json.Unmarshal([]byte(body), &document) != nil || document.Code != "Success" || document.AccessKeyID == "" {
		return s, fmt.Errorf("the answer to %s%s is no credential document", list, s.role)
	}
	s.expires = document.Expiration
	return s, nil
}

// exchange returns the body of a 200, and an error in words of anything else.
func exchange(client *http.Client, req *http.Request) (string, error) {
	resp, err := client.Do(req)
	if err != nil {
		return "", fmt.Errorf("nobody answers: %w: is imdsgate running on this node? (kubectl get pods -A -o wide -l app.kubernetes.io/name=imdsgate)", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return "", fmt.Errorf("read the answer to %s: %w", req.URL.Path, err)
	}
	if resp.StatusCode == http.StatusOK {
		return string(body), nil
	}
	hint := map[int]string{
		http.StatusUnauthorized:       "a session token is required here: -imds 2",
		http.StatusForbidden:          "this pod is refused its role",
		http.StatusNotFound:           "this pod has no role: annotate its service account, or measure the refusal with -want 404",
		http.StatusServiceUnavailable: "imdsgate cannot answer yet: try again",
	}[resp.StatusCode]
	if hint == "" {
		hint = "not expected of a metadata endpoint"
	}
	return "", fmt.Errorf("%s\n%s %s: %s: %w", hint, req.Method, req.URL.Path, resp.Status, errors.New(printable(body)))
}

// printable is the first of an answer's text, as it may be shown in a terminal.
func printable(b []byte) string {
	s := strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(string(b), ""))
	return strings.TrimSpace(s[:min(len(s), 500)])
}
