package aws

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

const (
	algorithm  = "AWS4-HMAC-SHA256"
	timeFormat = "20060102T150405Z"
)

// refusal is an error answer.
type refusal struct {
	status        int
	code, message string
}

// problem is something that every service refuses, each in its own words.
type problem int

const (
	unsigned problem = iota
	malformed
	unknownKey
	wrongToken
	expiredToken
	skewed
	wrongScope
	wrongSignature
)

func authRefusal(service string, p problem, detail string) *refusal {
	type words struct {
		status        int
		code, message string
	}
	query := map[problem]words{
		unsigned:       {403, "MissingAuthenticationToken", "Request is missing Authentication Token"},
		malformed:      {403, "IncompleteSignature", detail},
		unknownKey:     {403, "InvalidClientTokenId", "The security token included in the request is invalid."},
		wrongToken:     {403, "InvalidClientTokenId", "The security token included in the request is invalid"},
		expiredToken:   {403, "ExpiredToken", "The security token included in the request is expired"},
		skewed:         {403, "SignatureDoesNotMatch", detail},
		wrongScope:     {403, "SignatureDoesNotMatch", detail},
		wrongSignature: {403, "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and signing method. Consult the service documentation for details."},
	}
	s3 := map[problem]words{
		unsigned:       {403, "AccessDenied", "Access Denied"},
		malformed:      {400, "AuthorizationHeaderMalformed", detail},
		unknownKey:     {403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."},
		wrongToken:     {400, "InvalidToken", "The provided token is malformed or otherwise invalid."},
		expiredToken:   {400, "ExpiredToken", "The provided token has expired."},
		skewed:         {403, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large."},
		wrongScope:     {400, "AuthorizationHeaderMalformed", detail},
		wrongSignature: {403, "SignatureDoesNotMatch", "The request signature we calculated does not match the signature you provided. Check your key and signing method."},
	}
	w := query[p]
	if service == "s3" {
		w = s3[p]
	}
	return &refusal{w.status, w.code, w.message}
}

// authorization is a parsed Authorization header.
type authorization struct {
	accessKeyID, date, region, service string
	signedHeaders                      []string
	signature                          []byte
}

func parseAuthorization(h string) (a authorization, err error) {
	fields, ok := strings.CutPrefix(h, algorithm+" ")
	if !ok {
		return a, fmt.Errorf("the Authorization header is not %s", algorithm)
	}
	values := make(map[string]string)
	for field := range strings.SplitSeq(fields, ",") {
		k, v, _ := strings.Cut(strings.TrimSpace(field), "=")
		values[k] = v
	}
	credential := strings.Split(values["Credential"], "/")
	if len(credential) != 5 || credential[4] != "aws4_request" {
		return a, fmt.Errorf("the Credential %q is not ID/date/region/service/aws4_request", values["Credential"])
	}
	a.accessKeyID, a.date, a.region, a.service = credential[0], credential[1], credential[2], credential[3]
	a.signedHeaders = strings.Split(values["SignedHeaders"], ";")
	if !slices.IsSorted(a.signedHeaders) || !slices.Contains(a.signedHeaders, "host") {
		return a, fmt.Errorf("the SignedHeaders %q are not sorted or lack host", values["SignedHeaders"])
	}
	if a.signature, err = hex.DecodeString(values["Signature"]); err != nil || len(a.signature) != sha256.Size {
		return a, fmt.Errorf("the Signature is not that of %s", algorithm)
	}
	return a, nil
}

// authenticate finds out who signed the request.
func (s *Server) authenticate(ctx context.Context, r *request) *refusal {
	refuse := func(p problem, format string, args ...any) *refusal {
		return authRefusal(r.service, p, fmt.Sprintf(format, args...))
	}
	header := r.http.Header
	if header.Get("Authorization") == "" {
		return refuse(unsigned, "")
	}
	auth, err := parseAuthorization(header.Get("Authorization"))
	if err != nil {
		return refuse(malformed, "%v", err)
	}
	signed, err := time.Parse(timeFormat, header.Get("X-Amz-Date"))
	if err != nil {
		return refuse(malformed, "X-Amz-Date %q is not like %s", header.Get("X-Amz-Date"), timeFormat)
	}

	s.mu.Lock()
	caller, ok := s.sessions[auth.accessKeyID]
	s.mu.Unlock()
	if !ok {
		return refuse(unknownKey, "")
	}
	token := header.Get("X-Amz-Security-Token")
	if subtle.ConstantTimeCompare([]byte(token), []byte(caller.credentials.SessionToken)) != 1 {
		return refuse(wrongToken, "")
	}

	// The window is AWS's: 5 minutes, 15 with S3.
	window := 5 * time.Minute
	if r.service == "s3" {
		window = 15 * time.Minute
	}
	switch now := s.now().UTC(); {
	case signed.Before(now.Add(-window)):
		return refuse(skewed, "Signature expired: %s is now earlier than %s (%s - %.0f min.)", signed.Format(timeFormat),
			now.Add(-window).Format(timeFormat), now.Format(timeFormat), window.Minutes())
	case signed.After(now.Add(window)):
		return refuse(skewed, "Signature not yet current: %s is still later than %s (%s + %.0f min.)", signed.Format(timeFormat),
			now.Add(window).Format(timeFormat), now.Format(timeFormat), window.Minutes())
	}

	switch {
	case auth.service != r.service:
		return refuse(wrongScope, "Credential should be scoped to correct service: '%s'.", r.service)
	case !slices.Contains(r.regions, auth.region):
		if r.service == "s3" {
			return refuse(wrongScope, "The authorization header is malformed; the region '%s' is wrong; expecting '%s'", auth.region, r.regions[0])
		}
		return refuse(wrongScope, "Credential should be scoped to a valid region.")
	case auth.date != signed.Format("20060102"):
		return refuse(wrongScope, "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP: '%s' != '%s'.",
			auth.date, signed.Format("20060102"))
	}

	want, err := s.sign(ctx, r, auth, caller, signed)
	if err != nil {
		return refuse(malformed, "%v", err)
	}
	if subtle.ConstantTimeCompare(want, auth.signature) != 1 {
		return refuse(wrongSignature, "")
	}
	if !caller.user && !s.now().Before(caller.expires) {
		return refuse(expiredToken, "")
	}
	r.caller = caller
	r.call.AccessKeyID, r.call.Caller = auth.accessKeyID, caller.arn
	return nil
}

// sign computes the signature that the request should have: the SDK's signer signs a request made of nothing but the headers
// that the client signed. Headers that this signer never signs cannot be verified and fail.
func (s *Server) sign(ctx context.Context, r *request, auth authorization, caller *session, at time.Time) ([]byte, error) {
	sum := sha256.Sum256(r.body)
	payload := hex.EncodeToString(sum[:])
	if declared := r.http.Header.Get("X-Amz-Content-Sha256"); r.service == "s3" {
		switch declared {
		case payload:
		case "UNSIGNED-PAYLOAD":
			payload = declared
		case "":
			return nil, fmt.Errorf("x-amz-content-sha256 is missing")
		default:
			return nil, fmt.Errorf("x-amz-content-sha256 does not match the body")
		}
	}
	again := &http.Request{
		Method: r.http.Method,
		Host:   r.http.Host,
		Header: make(http.Header),
		Body:   r.reader(),
		URL:    &url.URL{Scheme: "http", Host: r.http.Host, Path: r.http.URL.Path, RawPath: r.http.URL.RawPath, RawQuery: r.http.URL.RawQuery},
	}
	if r.http.TLS != nil {
		again.URL.Scheme = "https"
	}
	for _, name := range auth.signedHeaders {
		switch name {
		case "host":
		case "content-length":
			n, err := strconv.ParseInt(r.http.Header.Get("Content-Length"), 10, 64)
			if err != nil { // the server moves it out of the headers
				n = r.http.ContentLength
			}
			again.ContentLength = n
		default:
			again.Header[http.CanonicalHeaderKey(name)] = r.http.Header.Values(name)
		}
	}
	if err := s.signer.SignHTTP(ctx, caller.credentials.SDK(), again, payload, r.service, auth.region, at,
		func(o *v4.SignerOptions) { o.DisableURIPathEscaping = r.service == "s3" }); err != nil {
		return nil, err
	}
	signed, err := parseAuthorization(again.Header.Get("Authorization"))
	if err != nil {
		return nil, err
	}
	// The signer adds what must be signed: a client that left out the date or the session token fails here.
	if !slices.Equal(signed.signedHeaders, auth.signedHeaders) {
		return nil, fmt.Errorf("the SignedHeaders are %q, but must be %q", strings.Join(auth.signedHeaders, ";"), strings.Join(signed.signedHeaders, ";"))
	}
	return signed.signature, nil
}
