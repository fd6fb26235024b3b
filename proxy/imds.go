package proxy

import (
	"bytes"
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"net/url"
	"strings"
	"time"

	"github.com/imdsgate/imdsgate/cache"
)

// wireTime is the only form of a time that every client reads: the CRT aborts on an offset, botocore's guard needs whole
// seconds.
const wireTime = "2006-01-02T15:04:05Z"

// Encode is the credential document as the metadata endpoint writes it, for cache.Options.Encode. Every field is there for
// some SDK: see "Credential document" in the tests' conformance table.
func Encode(c cache.Credentials) []byte {
	return encode(struct {
		Code            string
		LastUpdated     string
		Type            string
		AccessKeyId     string
		SecretAccessKey string
		Token           string
		Expiration      string
	}{
		"Success", c.Issued.UTC().Format(wireTime), "AWS-HMAC",
		c.AccessKeyID, c.SecretAccessKey(), c.SessionToken(), c.Expires.UTC().Format(wireTime),
	})
}

// instanceProfile is iam/info of an instance whose profile has the pod's role. Terraform and .NET read the account from it.
func instanceProfile(roleARN string, now time.Time) []byte {
	id := sha256.Sum256([]byte(roleARN))
	return encode(struct {
		Code               string
		LastUpdated        string
		InstanceProfileArn string
		InstanceProfileId  string
	}{
		"Success", now.UTC().Format(wireTime),
		strings.Replace(roleARN, ":role/", ":instance-profile/", 1),
		"AIPA" + base32.StdEncoding.EncodeToString(id[:])[:17],
	})
}

func encode(document any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	_ = e.Encode(document) // strings only: cannot fail
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// named tells whether name, as it stands in the request target after the role list's path, is g's role. Clients of kube2iam
// and kiam also send path and name or the whole ARN, boto 2 and others quote it, some append a slash. Nothing else is g's.
func (g *Grant) named(name string) bool {
	if strings.Contains(name, "%") {
		unescaped, err := url.PathUnescape(name)
		if err != nil {
			return false
		}
		name = unescaped
	}
	name = strings.TrimSuffix(name, "/")
	return name != "" && (name == g.Role || name == g.Path || name == g.Key.RoleARN)
}
