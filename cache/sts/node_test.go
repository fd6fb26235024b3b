package sts

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// metadata is an instance metadata endpoint on loopback.
func metadata(t *testing.T, paths map[string]string) {
	t.Helper()
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "21600")
			fmt.Fprint(w, "token")
			return
		}
		body, ok := paths[strings.TrimPrefix(r.URL.Path, "/latest/meta-data/")]
		if !ok || r.Header.Get("X-Aws-Ec2-Metadata-Token") != "token" {
			http.NotFound(w, r)
			return
		}
		fmt.Fprint(w, body)
	}))
	t.Cleanup(h.Close)
	t.Setenv("AWS_EC2_METADATA_DISABLED", "false")
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", h.URL)
}

func TestRegionFromMetadata(t *testing.T) {
	environment(t, "http://127.0.0.1:1")
	t.Setenv("AWS_REGION", "")
	metadata(t, map[string]string{"placement/region": "ap-south-2\n"})
	s, err := New(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got := s.client.Options().Region; got != "ap-south-2" {
		t.Errorf("region %q, want the endpoint's", got)
	}
}

func TestNoRegion(t *testing.T) {
	hang := make(chan struct{})
	silent := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hang }))
	t.Cleanup(silent.Close)
	t.Cleanup(func() { close(hang) })
	for name, set := range map[string]func(){
		"metadata off":   func() {},
		"metadata empty": func() { metadata(t, map[string]string{"placement/region": ""}) },
		"silence": func() {
			t.Setenv("AWS_EC2_METADATA_DISABLED", "false")
			t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", silent.URL)
		},
	} {
		environment(t, "http://127.0.0.1:1")
		t.Setenv("AWS_REGION", "")
		set()
		begin := time.Now()
		_, err := New(t.Context(), Options{})
		if err == nil || !strings.Contains(err.Error(), "set the environment variable AWS_REGION") {
			t.Errorf("%s: error %v, want one that names AWS_REGION", name, err)
		}
		if took := time.Since(begin); took > imdsTimeout+2*time.Second {
			t.Errorf("%s: took %v", name, took)
		}
	}
}

func TestBaseRoleARN(t *testing.T) {
	info := func(arn string) map[string]string {
		return map[string]string{"iam/info": `{"Code":"Success","LastUpdated":"2026-01-02T03:04:05Z","InstanceProfileArn":"` + arn + `","InstanceProfileId":"AIPA"}`}
	}
	for _, tt := range []struct {
		name  string
		paths map[string]string
		want  string
	}{
		{"aws", info("arn:aws:iam::123456789012:instance-profile/path/nodes"), "arn:aws:iam::123456789012:role/"},
		{"china", info("arn:aws-cn:iam::123456789012:instance-profile/nodes"), "arn:aws-cn:iam::123456789012:role/"},
		{"no profile", nil, ""},
		{"no ARN", info("nodes"), ""},
		{"no account", info("arn:aws:iam:::instance-profile/nodes"), ""},
		{"no JSON", map[string]string{"iam/info": "<html>"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			environment(t, "http://127.0.0.1:1")
			metadata(t, tt.paths)
			s, err := New(t.Context(), Options{})
			if err != nil {
				t.Fatal(err)
			}
			got, err := s.BaseRoleARN(t.Context())
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("%q, %v; want %q", got, err, tt.want)
			}
			if err != nil && !strings.Contains(err.Error(), "instance profile") {
				t.Errorf("error %v does not say what to do", err)
			}
		})
	}
}
